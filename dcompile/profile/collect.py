"""Serves a request several times: plainly, timed, and looked at."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from dcompile.cost.call import Facts
from dcompile.cost.cuda import described
from dcompile.cost.looking import chosen, probes
from dcompile.cost.machine import Machine, measure
from dcompile.errors import ContractError
from dcompile.profile.watch import Observer, Seen, Timed, Timer, resident_bytes
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result
from dcompile.runtime.opening import open_backend

Progress = Callable[[str], None]
UNKNOWN_RATE = 1e18


@dataclass(frozen=True)
class Request:
    """What is generated: token ids of each prompt, and the arguments of `Runner.generate`."""

    prompts: Sequence[Sequence[int]]
    gen_length: int
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Round:
    """One timed generation."""

    iterations: Sequence[Timed]
    wall: float


@dataclass(frozen=True)
class Capture:
    """A request's generation: times of the median round, and what every iteration ran over."""

    runner: Runner
    request: Request
    load: float
    chosen: Round
    seen: Sequence[Seen]
    results: Sequence[Result]
    plain: Sequence[float]
    """Seconds of the rounds that nobody timed inside."""
    timed: Sequence[float]
    machine: Machine
    resident: int
    """Bytes of the process in memory before the artifact was opened."""

    @cached_property
    def plan(self) -> Mapping[str, Any]:
        """The plan, in which launches of CUDA kernels say what they are."""
        return described(self.runner.artifact)

    @property
    def overhead(self) -> float:
        """What timing costs, as a share of the plain time."""
        return statistics.median(self.timed) / statistics.median(self.plain) - 1

    def facts(self, at: int) -> Facts:
        """What iteration `at` ran over, for the costs."""
        seen = self.seen[at]
        looked = chosen(self.plan, seen.probes)
        return Facts(seen.R, seen.B, seen.row_limit, seen.row_seq, seen.chosen, *looked)


def capture(
    runner: Runner, request: Request, load: float, rounds: int, progress: Progress, resident: int
) -> Capture:
    """Warm up, then take turns: a plain round, a timed one; last, one that looks inside."""
    progress("warming up")
    _serve(runner, request)
    plain, timed = [], []
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        plain.append(_serve(runner, request)[1])
        timed.append(_timed(runner, request))
    progress("looking inside")
    runner.watch = observer = Observer(runner.executor, probes(described(runner.artifact)))
    try:
        results, _ = _serve(runner, request)
    finally:
        runner.watch = None
    progress("measuring the machine")
    machine = _machine(runner)
    chosen = sorted(timed, key=lambda each: each.wall)[len(timed) // 2]
    _check_same(chosen.iterations, observer.iterations)
    walls = [each.wall for each in timed]
    return Capture(
        runner, request, load, chosen, observer.iterations, results, plain, walls, machine, resident
    )


def load_runner(path: Path, threads: int | None) -> tuple[Runner, float, int]:
    """A runner, the seconds that opening it took, and the process's bytes before."""
    before, start = resident_bytes(), perf_counter()
    artifact = open_artifact(path)
    runner = Runner(artifact, open_backend(artifact, threads))
    return runner, perf_counter() - start, before


def _serve(runner: Runner, request: Request) -> tuple[list[Result], float]:
    start = perf_counter()
    results = runner.generate(
        request.prompts, gen_length=request.gen_length, **dict(request.arguments)
    )
    return results, perf_counter() - start


def _machine(runner: Runner) -> Machine:
    """What runs the artifact; of a GPU no rate of products is known, its floors are those of bytes."""
    if runner.artifact.manifest["target"] == "cuda":
        from dcompile.runtime.cuda.executor import CudaExecutor

        assert isinstance(runner.executor, CudaExecutor)
        return Machine(runner.executor.bandwidth(), UNKNOWN_RATE)
    return measure(runner.artifact.manifest["model"]["dtype"], runner.executor.threads)


def _timed(runner: Runner, request: Request) -> Round:
    runner.watch = timer = Timer(runner.executor)
    try:
        wall = _serve(runner, request)[1]
    finally:
        runner.watch = None
    return Round(timer.iterations, wall)


def _check_same(timed: Sequence[Timed], seen: Sequence[Seen]) -> None:
    if [(t.R, t.B) for t in timed] != [(s.R, s.B) for s in seen]:
        what = "a request served twice did not run the same iterations"
        raise ContractError(what, remedy="report this as a bug of dcompile")
