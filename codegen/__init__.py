"""Planned program in, source text and plan out; runs nothing."""
