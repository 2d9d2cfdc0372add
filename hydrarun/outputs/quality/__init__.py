"""How good a picture is: metrics, and a judge of captioned scenes."""
