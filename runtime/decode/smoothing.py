"""Iteration smoothing by the clock of a request (dInfer, arXiv 2510.08666): t counts its iterations."""

from __future__ import annotations

FIRST, GROWTH, DECAY = 0.15, 0.02, 0.02


def soft_weight(t: int, most: float) -> float:
    """How much of what was predicted goes into a mask's next embedding: min(0.15 + 0.02 t, most)."""
    return min(FIRST + GROWTH * t, most)


def soft_threshold(t: int, lowest: float) -> float:
    """The threshold while the mixtures settle: max(1 - 0.02 t, lowest)."""
    return max(1.0 - DECAY * t, lowest)
