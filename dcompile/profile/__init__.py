"""Profiles of a generation, down to each launch."""
