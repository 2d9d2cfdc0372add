"""Many runs from one command line: their order, what they would take, what failed, and launchers beyond this process."""
