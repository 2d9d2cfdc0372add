"""Ranks: positions, degrees, mesh and collectives."""
