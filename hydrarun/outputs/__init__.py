"""Files that a run writes, what is read back from them, how good they are, the report."""
