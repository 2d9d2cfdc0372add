"""Caches: they replace parts of a denoising step that would change little."""
