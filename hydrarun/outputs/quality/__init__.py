"""Quality of outputs: metrics, and a judge of captioned scenes."""
