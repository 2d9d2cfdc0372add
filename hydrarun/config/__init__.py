"""From overrides to one checked configuration, without torch."""
