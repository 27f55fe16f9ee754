"""Which policies, managers and caches go together, and what they are measured by."""
