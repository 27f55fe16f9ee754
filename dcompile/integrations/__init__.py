"""Artifacts inside other people's programs; each module needs that program installed."""
