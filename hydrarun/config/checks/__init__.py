"""Checks that a configuration must pass before weights are read."""
