"""From checkpoint files to weights in place."""
