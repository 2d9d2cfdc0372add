"""Sweeps, many runs from one command line: points, their order, dry runs and the driver."""
