"""What every room may use: errors, devices, progress, timing, text, tables, ranks."""
