"""A loaded model and what is done with it."""
