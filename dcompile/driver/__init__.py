"""Compiles: from a checkpoint or a module to an artifact."""
