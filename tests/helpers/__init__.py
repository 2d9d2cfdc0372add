"""What tests share: tiny checkpoints, ranks, and runs on them."""
