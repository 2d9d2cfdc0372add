"""Recorded facts of a CPU run, for runs that a test writes without drawing."""

PLAIN = {
    "verified": False,
    "inputs": [],
    "device": "cpu",
    "dtype": "float32",
    "attention": "sdpa",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "compile": "NoCompile",
    "quantization": "none",
}
