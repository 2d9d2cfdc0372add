"""Offload: where weights are kept while they are not in use, and how they move to the device."""
