"""Helpers shared by tests: tiny checkpoints, ranks, and runs on them."""
