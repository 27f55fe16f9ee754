"""A generation: requests, sequences, rows, blocks."""
