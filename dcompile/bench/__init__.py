"""How fast an artifact is, beside its rivals."""
