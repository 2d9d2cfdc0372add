"""Starts the processes of a run, sends them jobs and ends them."""
