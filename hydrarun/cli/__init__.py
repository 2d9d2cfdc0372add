"""The command line: verbs, arguments, recipes, sweeps."""
