"""Loads and runs an artifact; needs no compiler and no model code."""
