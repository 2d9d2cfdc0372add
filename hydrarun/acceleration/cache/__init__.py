"""Caches: what stands in for parts of a denoising step that would change little."""
