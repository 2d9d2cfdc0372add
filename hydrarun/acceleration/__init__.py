"""What makes a run faster or smaller: caches, offload, parallelism, quantization, compilation."""
