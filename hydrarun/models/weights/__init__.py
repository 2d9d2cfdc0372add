"""Loads weights from checkpoint files into models."""
