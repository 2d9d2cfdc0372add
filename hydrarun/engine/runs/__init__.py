"""Executes single runs and batches, and measures their quality."""
