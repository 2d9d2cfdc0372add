"""Parallel methods: each is written once, against the transformer contract, and works for every model."""
