"""Layers that handle their own sharding across devices, so that blocks do not have to."""
