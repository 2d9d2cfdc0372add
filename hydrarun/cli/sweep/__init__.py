"""Many runs from one command line: points, their order, dry runs, the driver."""
