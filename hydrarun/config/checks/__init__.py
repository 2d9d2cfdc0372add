"""What a configuration must satisfy before weights are read."""
