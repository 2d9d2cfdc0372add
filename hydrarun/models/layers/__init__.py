"""Layers that know how they are spread over devices, so that blocks do not have to."""
