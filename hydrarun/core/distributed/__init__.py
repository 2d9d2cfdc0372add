"""Ranks: their places, degrees, mesh and collectives."""
