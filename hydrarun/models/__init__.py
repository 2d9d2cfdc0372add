"""The `Transformer` contract (`transformer.py`) and one file per model family that implements it."""
