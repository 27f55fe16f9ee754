"""Rewrites of the program, one pass a file."""
