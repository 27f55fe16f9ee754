"""Iterations that need no decision of the host: the same rows again, until a block is done.

On a GPU this is a loop on the device (`runtime/cuda/graphs.py`); here it is the same control flow, so
that what the device does is tested on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Flag = npt.NDArray[np.int32]
"""[1]; another thread may set it while iterations run."""
CLOCKS = ("iteration", "tick")
"""Inputs that count a sequence's iterations, while its block is not done."""


@dataclass(frozen=True)
class Turns:
    """What a run of iterations came to, per sequence."""

    performed: list[int]
    """Iterations until its block was done, or all of them."""
    done: list[bool]


def repeat(
    step: Callable[[], Bools],
    arrays: Mapping[str, npt.NDArray[Any]],
    limit: int,
    every: int = 1,
    wanted: Flag | None = None,
) -> Turns:
    """Run `step` up to `limit` times, until a sequence is done; look only after each `every` turns.

    Where it looks it also ends, after one turn at least, when the host is `wanted` elsewhere.
    `step` runs one iteration and returns done [B].  Turns after a sequence is done change none of its
    tokens, and are not counted for it.
    """
    finished: Bools | None = None
    performed: npt.NDArray[np.int64] | None = None
    for turn in range(1, limit + 1):
        done = step()
        if finished is None or performed is None:
            finished, performed = np.zeros_like(done), np.zeros(done.shape, np.int64)
        performed += ~finished
        finished |= done
        asked = wanted is not None and wanted[0] != 0
        if turn == limit or (turn % every == 0 and (asked or finished.any())):
            break
        for name in CLOCKS:
            if name in arrays:
                arrays[name] += ~finished
    assert finished is not None and performed is not None, "at least one turn"
    return Turns(performed.tolist(), finished.tolist())
