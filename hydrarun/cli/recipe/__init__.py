"""What the verb `recipe` does: run, export, verify, list, schema."""
