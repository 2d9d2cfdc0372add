"""Reading and writing finished media: one module per container format."""
