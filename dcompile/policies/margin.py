"""margin: Dream's schedule over the whole canvas, the positions of largest top-1 to top-2 margin first.

Two tokens of nearly the same probability are a decision that is open, however large both are; the
margin sees that, and the confidence does not. The schedule is that of `entropy` (Dream 7B, arXiv
2508.15487).
"""

from __future__ import annotations

from dcompile.policies.entropy import schedule

POLICY = schedule("margin", "margin")
