"""The contract (`transformer.py`), and one file for each family of models that keeps it."""
