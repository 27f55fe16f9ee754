"""Runs a plan on the processor."""
