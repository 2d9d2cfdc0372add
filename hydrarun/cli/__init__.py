"""The command line: verbs, arguments, recipes and sweeps."""
