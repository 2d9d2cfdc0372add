"""Composes overrides into one checked configuration, without torch."""
