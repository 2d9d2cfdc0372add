"""Recipes: small YAML files that are shared, run, exported and verified."""
