"""Loads and runs models, plans and measures runs, and calibrates caches."""
