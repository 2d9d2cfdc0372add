"""Estimates a run's memory and time before its weights are read, and finds settings that fit."""
