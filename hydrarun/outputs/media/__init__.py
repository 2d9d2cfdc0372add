"""Reading and writing media files: a module for each format, and `kinds`, the table of output kinds."""
