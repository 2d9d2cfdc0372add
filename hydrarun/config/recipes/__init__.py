"""Recipes as untrusted files: finding, reading and vetting them."""
