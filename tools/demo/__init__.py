"""Modules of the training tool for the demo model, see tools/train_demo.py."""
