"""What shrinking cost: one file, one question. Pure functions on arrays of stored answers; no torch, no files."""
