"""Stages: the steps from a request to pictures, listed in a model's YAML."""
