"""Times the tiles of each problem on a GPU and keeps the fastest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor

from dcompile.codegen.triton.tiles import Tiles
from dcompile.runtime.cuda.device import Device
from dcompile.tuning.placed import FLUSH, Placed
from dcompile.tuning.problems import Problem
from dcompile.tuning.select import Built, compiled, worth_trying

# What is within the noise of two runs is no reason to leave the default.
MARGIN = 0.02


@dataclass(frozen=True)
class Trial:
    """One choice of tiles: its time, or why it has none."""

    tiles: Tiles
    seconds: float | None
    refused: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of one problem; `trials` begins with the default's."""

    problem: Problem
    trials: Sequence[Trial]

    @property
    def default(self) -> Trial:
        return self.trials[0]

    @property
    def best(self) -> Trial | None:
        """The fastest; the default where nothing is clearly faster; None where nothing ran."""
        ran = [trial for trial in self.trials if trial.seconds is not None]
        if not ran:
            return None
        fastest = min(ran, key=lambda trial: trial.seconds or 0.0)
        before = self.default.seconds
        if before is not None and (fastest.seconds or 0.0) > (1 - MARGIN) * before:
            return self.default
        return fastest

    def entry(self, device: str) -> dict[str, Any]:
        """Its line of the table."""
        best = self.best
        assert best is not None and best.seconds is not None
        was = self.default.seconds
        return {
            "tiles": asdict(best.tiles),
            "us": round(best.seconds * 1e6, 2),
            "default_us": None if was is None else round(was * 1e6, 2),
            "device": device,
            "date": date.today().isoformat(),
        }


def tune(
    problems: Sequence[Problem],
    device: Device,
    *,
    rows: int = 32,
    most: int = 32,
    rounds: int = 20,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Time up to `most` choices of tiles for each problem, over `rows` rows, with cold caches."""
    device.enter()
    arch = device.arch
    flush = device.allocate(FLUSH, "what clears the caches")
    outcomes = []
    try:
        for problem in problems:
            progress(f"compiling {problem.shape.key}")
            tried = worth_trying(problem, arch, most)
            made = compiled(problem, arch, tried)
            progress(f"timing {problem.shape.key}")
            operands = problem.operands(rows, where())
            pairs = zip(tried, made, strict=True)
            trials = [
                Trial(tiles, None, built)
                if isinstance(built, str)
                else Trial(
                    tiles, _time(problem, device, tiles, built, operands, rows, rounds, flush)
                )
                for tiles, built in pairs
            ]
            outcomes.append(Outcome(problem, trials))
    finally:
        device.wait()
        device.free(flush)
    return outcomes


def where() -> str:
    """The torch device on which operands are drawn: the GPU where torch has it, or they are copied there."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _time(
    problem: Problem,
    device: Device,
    tiles: Tiles,
    built: Built,
    operands: Mapping[str, Tensor],
    rows: int,
    rounds: int,
    flush: int,
) -> float:
    symbols = problem.symbols(rows)
    placed = Placed(device, problem.lowering(device.arch, tiles), built, operands, symbols)
    try:
        return statistics.median(placed.seconds(rounds, flush))
    finally:
        placed.close()


def merged(
    table: Mapping[str, Mapping[str, Any]], outcomes: Sequence[Outcome], arch: int, device: str
) -> dict[str, dict[str, Any]]:
    """The table with what was found put in; a shape that was tuned before is replaced."""
    out = {name: dict(entries) for name, entries in table.items()}
    mine = out.setdefault(f"sm_{arch}", {})
    for outcome in outcomes:
        if outcome.best is not None:
            mine[outcome.problem.shape.key] = outcome.entry(device)
    return out
