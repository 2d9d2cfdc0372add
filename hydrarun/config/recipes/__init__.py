"""Recipes as untrusted files: found, read, vetted."""
