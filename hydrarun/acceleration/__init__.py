"""Accelerations: caches, offload, parallelism, quantization, compilation."""
