"""Utilities that every other package may use: errors, devices, progress, timing, text, tables, ranks."""
