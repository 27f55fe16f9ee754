"""Finds where an artifact departs from its model."""
