"""Fits and searches a cache's settings for a model."""
