"""Many runs from one command line: their order, what they would take, what failed, and where they run."""
