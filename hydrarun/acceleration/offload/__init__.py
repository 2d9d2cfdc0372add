"""Where weights wait while nobody computes with them, and how they come to the device."""
