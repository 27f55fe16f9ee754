"""Two watches of a generation: one times every launch, one looks at what the steps read and decided.

They are two because looking costs time: a request is served again, token for token the same, to be
looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from dcompile.cost.looking import Launcher, look
from dcompile.runtime.state import Binding

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Timed:
    """One iteration in seconds since the generation began.

    From `begin`, where the one before ended, to `start` the host works; `seconds` are the launches'.
    """

    begin: float
    start: float
    end: float
    R: int
    B: int
    seconds: Floats


class Timer:
    """Times every launch of a generation."""

    def __init__(self, executor: Launcher) -> None:
        self._executor = executor
        self.restart()

    def restart(self) -> None:
        """The generation begins now."""
        self.iterations: list[Timed] = []
        self.began = perf_counter()
        self._last = 0.0

    def launch(self, binding: Binding, prompts: Mapping[int, int]) -> None:
        seconds = np.zeros(len(self._executor.plan.launches))
        start = perf_counter() - self.began
        self._executor.launch(binding, seconds)
        end = perf_counter() - self.began
        self.iterations.append(Timed(self._last, start, end, binding.R, binding.B, seconds))
        self._last = end


@dataclass(frozen=True)
class Seen:
    """What one iteration ran over and decided; canvases are [N, L]."""

    R: int
    B: int
    prompts: Mapping[int, int]
    """Slot -> index of the prompt that it serves."""
    row_seq: Ints
    row_pos: Ints
    row_limit: Ints
    chosen: Ints | None
    """The rows whose logits choose tokens; None where the plan does not ask."""
    before: Ints
    after: Ints
    confidence: Floats
    """[N, L], of the candidates; NaN elsewhere."""
    probes: Mapping[int, npt.NDArray[Any]]
    """What the asked launches left in the asked buffers."""
    resident: int
    """Bytes of the process in memory."""


class Observer:
    """Looks into a generation; `probes` says after which launch to copy which buffer."""

    def __init__(self, executor: Launcher, probes: Mapping[int, int]) -> None:
        self._executor = executor
        self._probes = probes
        self.iterations: list[Seen] = []

    def launch(self, binding: Binding, prompts: Mapping[int, int]) -> None:
        canvas = self._executor.state["canvas"]
        before = canvas.copy()
        probes = look(self._executor, binding, self._probes)
        arrays = binding.arrays
        zeros = np.zeros(binding.R, dtype=np.int64)
        self.iterations.append(
            Seen(
                R=binding.R,
                B=binding.B,
                prompts=dict(prompts),
                row_seq=arrays.get("row_seq", zeros).copy(),
                row_pos=arrays.get("row_pos", zeros).copy(),
                row_limit=arrays.get("row_limit", zeros).copy(),
                chosen=_copy(arrays.get("choice_row")),
                before=before,
                after=canvas.copy(),
                confidence=_confidence(binding, before.shape),
                probes=probes,
                resident=resident_bytes(),
            )
        )


def _copy(array: npt.NDArray[Any] | None) -> Ints | None:
    return None if array is None else array.reshape(-1).copy()


def _confidence(binding: Binding, shape: Sequence[int]) -> Floats:
    out = np.full(tuple(shape), np.nan)
    place, arrays = binding.plan.outputs.get("confidence"), binding.arrays
    if place is not None and {"block_seq", "block_pos"} <= arrays.keys():
        out[arrays["block_seq"][:, None], arrays["block_pos"]] = binding.values(place)
    return out


def resident_bytes() -> int:
    """The process's pages in memory, mapped weights among them; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
