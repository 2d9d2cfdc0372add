"""Picture quality: captioned scenes of coloured shapes, and a rule that judges a picture against its caption."""
