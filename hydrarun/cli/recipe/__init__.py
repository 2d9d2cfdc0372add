"""Implements the verb `recipe`: run, export, verify, list, schema."""
