"""What the tests of policies draw: logits with ties, and run-time knobs."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

VOCAB, MASK = 11, 4

KNOBS: dict[str, st.SearchStrategy[float]] = {
    "threshold": st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]),
    "threshold_low": st.sampled_from([0.05, 0.2, 0.6]),
    "threshold_edit": st.sampled_from([0.0, 0.05, 0.3, 0.5, 1.0]),
    "threshold_remask": st.sampled_from([0.05, 0.2, 0.4, 1.0]),
    "post_steps": st.integers(0, 4).map(float),
    "factor": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    "steps": st.integers(1, 12).map(float),
    "eps": st.sampled_from([1e-3, 0.12]),  # no count on the edge of a whole number
    "alpha": st.sampled_from([0.0, 0.7, 3.0]),
    "beta": st.sampled_from([0.0, 0.8, 1.0]),
    "gamma": st.sampled_from([0.2, 1.0]),
}


def rows(n: int) -> st.SearchStrategy[np.ndarray]:
    """Logits [n, V]: ties, equal and nearly equal rows, sure ones, and such as prefer the mask."""
    level = st.sampled_from([-3.0, 0.0, 0.0, 1.0, 2.0, 2.0, 9.0])
    one = st.lists(level, min_size=VOCAB, max_size=VOCAB)
    flat = st.just([0.5] * VOCAB)
    mask_first = one.map(lambda z: [*z[:MASK], 30.0, *z[MASK + 1 :]])
    kinds = st.one_of(one, flat, mask_first)
    equal = kinds.map(lambda z: [z] * n)
    nearly = one.map(lambda z: [[x * (1 + 2e-6 * i) for x in z] for i in range(n)])
    return st.one_of(st.lists(kinds, min_size=n, max_size=n), equal, nearly).map(np.array)
