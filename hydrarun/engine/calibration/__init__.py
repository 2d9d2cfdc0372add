"""Fits and searches that make a cache's settings for a model."""
