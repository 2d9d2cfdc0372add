"""One module per model family: its transformer and what is peculiar to it."""
