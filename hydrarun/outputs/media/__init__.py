"""Reading and writing finished media: a file for each format, and `kinds` of what can be drawn."""
