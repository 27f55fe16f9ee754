"""Time an artifact's step beside eager PyTorch and torch.compile with the same rows and cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcompile.cost.cuda import described
from dcompile.cost.launches import costs
from dcompile.cost.looking import step_facts
from dcompile.cost.machine import Machine, measure
from dcompile.errors import OptionError
from dcompile.ir.work import Work
from dcompile.options import Options, recorded_options
from dcompile.runtime.backend import Backend
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.pages import share_in_large
from dcompile.runtime.tensors import tensor_of
from dcompile.runtime.weights import Array

Step = Callable[[Mapping[str, Any]], object]
"""Takes inputs by name: arrays an artifact's, tensors a rival's."""

RIVALS = {
    "plain": "the plain model, whole sequence, every expert for every token (the reference)",
    "full": "eager PyTorch, whole sequence, only touched experts",
    "eager": "eager PyTorch, the window's rows, same cache, only touched experts",
    "compile": "torch.compile of `eager`",
}


@dataclass(frozen=True)
class Row:
    """One contestant: milliseconds a forward, median and quartiles."""

    name: str
    median: float
    low: float
    high: float

    def ratio(self, other: float) -> float:
        return self.median / other


@dataclass(frozen=True)
class Part:
    """The launches of one kernel in a step: how many, milliseconds (median), and their floor."""

    kernel: str
    launches: int
    median: float
    floor: float


@dataclass(frozen=True)
class Table:
    rows: list[Row]
    parts: list[Part]
    floor: float  # milliseconds
    bandwidth: float  # GB/s
    rate: float  # GFLOP/s
    experts: float  # touched, mean of the layers that have them
    policy: float  # share of the launches' time that the policy takes
    large: float | None  # share of the artifact that is mapped in large pages
    context: int
    window: int
    threads: int
    dtype: str

    def text(self) -> str:
        ours = next(r for r in self.rows if r.name == "artifact").median
        lines = [
            f"one forward, {self.window} rows at context {self.context}, {self.dtype}, "
            f"{self.threads} thread(s); floor {self.floor:.2f} ms "
            f"({self.bandwidth:.1f} GB/s, {self.rate:.0f} GFLOP/s, {self.experts:.1f} experts a layer)",
            f"{'':28}{'ms':>9}{'quartiles':>18}{'x floor':>9}{'x artifact':>12}",
        ]
        for r in self.rows:
            spread = f"{r.low:.2f}..{r.high:.2f}"
            lines.append(
                f"{r.name:28}{r.median:9.2f}{spread:>18}{r.ratio(self.floor):9.2f}{r.ratio(ours):12.2f}"
            )
        lines.append(f"{'kernel':28}{'ms':>9}{'launches':>18}{'x floor':>9}")
        for p in self.parts:
            times = f"{p.median / p.floor:9.2f}" if p.floor else f"{'-':>9}"
            lines.append(f"{p.kernel:28}{p.median:9.2f}{p.launches:18}{times}")
        lines.append(f"policy and bookkeeping: {self.policy:.2%} of the launches' time")
        if self.large is not None:
            lines.append(f"in large pages: {self.large:.0%} of the artifact")
        return "\n".join(lines) + "\n"

    def json(self) -> dict[str, Any]:
        lists = {"rows": [vars(r) for r in self.rows], "parts": [vars(p) for p in self.parts]}
        return {**vars(self), **lists}


def step_inputs(
    runner_inputs: Sequence[str],
    context: int,
    block: int,
    window: int,
    parameters: Mapping[str, float],
) -> dict[str, Array]:
    """The inputs of one window iteration of one sequence whose block starts at `context - block`."""
    start = context - block
    first = context - window
    rows = np.arange(first, context)
    one = np.ones(1, np.int64)
    known = {
        "row_seq": np.zeros(window, np.int64),
        "row_pos": rows,
        "row_limit": np.full(window, context),
        "block_seq": one * 0,
        "block_pos": np.arange(start, context)[None],
        "choice_row": np.arange(start - first, context - first)[None],
        "iteration": one * 0,
        "entered": one * block,
        "temperature": np.zeros(1, np.float32),
        "seed": one * 0,
        "tick": one * 0,
        "prompt_end": one * start,
        "full": one,
        "row_weight": np.full(window, 0.3, np.float32),
        **{name: np.full(1, value, np.float32) for name, value in parameters.items()},
    }
    return {name: known[name] for name in runner_inputs}


def prepare(canvas: Tensor | Array, context: int, block: int, mask_id: int, vocab: int) -> None:
    """Random tokens, the same for every contestant, and masks at random in half of the block at the end.

    That is a block in the middle of its decoding.  With random weights equal tokens choose nearly the same
    experts, so a block of masks alone would touch only a few of them.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (context,), generator=generator)
    ids[ids == mask_id] = (mask_id + 1) % vocab
    undecided = torch.randperm(block, generator=generator)[: masks(block)]
    ids[context - block + undecided] = mask_id
    canvas[0, :context] = ids


def masks(block: int) -> int:
    """How many positions of a block `prepare` leaves undecided."""
    return (block + 1) // 2


def paired(
    contestants: Mapping[str, Step],
    inputs: Mapping[str, Mapping[str, Any]],
    reset: Callable[[], None],
    rounds: int,
) -> list[Row]:
    """Time the contestants in turn, round by round, after a warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, step in contestants.items():
            reset()
            start = time.perf_counter()
            step(inputs[name])
            took = (time.perf_counter() - start) * 1e3
            if turn >= 2:
                times[name].append(took)
    rows = []
    for name, samples in times.items():
        quarters = statistics.quantiles(samples, n=4)
        rows.append(Row(name, statistics.median(samples), quarters[0], quarters[2]))
    return rows


def bench(
    artifact: Path,
    against: Sequence[str],
    checkpoint: Path | None = None,
    *,
    context: int | None = None,
    rounds: int = 15,
    threads: int | None = None,
) -> Table:
    """The artifact's window step beside `against` (names of RIVALS), in one process.

    The rivals need the checkpoint; raises OptionError without it.
    """
    if against and checkpoint is None:
        raise OptionError(
            f"{', '.join(against)} need the checkpoint", remedy="--checkpoint PATH of this artifact"
        )
    runner = Runner.load(artifact, threads=threads)
    manifest, plan = runner.artifact.manifest, runner.artifact.plan
    options, model = manifest["options"], manifest["model"]
    block = options["block_length"]
    context = min(context or options["max_length"], options["max_length"])
    if context < block:
        what = f"a context of {context} has no block of {block} positions in it"
        raise OptionError(what, remedy=f"--context {block}, or more")
    threads = runner.executor.threads
    torch.set_num_threads(threads)
    parameters = manifest["policy"]["parameters"]
    ours = step_inputs(list(plan.inputs), context, block, block, parameters)
    contestants: dict[str, Step] = {"artifact": runner.executor.step}
    inputs: dict[str, Mapping[str, Any]] = {"artifact": ours}
    canvases: list[Tensor | Array] = [runner.executor.state["canvas"]]
    for name in against:
        assert checkpoint is not None
        contestants[name], canvas = _rival(
            name, checkpoint, recorded_options(options, str(artifact))
        )
        rows = context if name == "full" else block
        theirs = step_inputs(list(ours), context, block, rows, parameters)
        inputs[name] = {key: tensor_of(value) for key, value in theirs.items()}
        canvases.append(canvas)

    def reset() -> None:
        for canvas in canvases:
            prepare(canvas, context, block, model["mask_id"], model["vocab_size"])

    reset()
    binding = runner.executor.fill(ours)
    text = described(runner.artifact)
    work = costs(text, step_facts(runner.executor, text, binding))
    touched = [one.touched for one in work if one.touched is not None]
    rows = paired(contestants, inputs, reset, rounds)
    machine = measure(model["dtype"], threads)
    times = _launch_times(runner.executor, ours, reset, rounds)
    return Table(
        rows=rows,
        parts=_parts(runner.executor, times, work, machine),
        policy=_policy_share(plan.text["launches"], times),
        floor=sum(_floor(one, machine) for one in work),
        bandwidth=machine.bandwidth / 1e9,
        rate=machine.rate / 1e9,
        experts=statistics.mean(touched) if touched else 0.0,
        large=share_in_large(artifact),
        context=context,
        window=block,
        threads=threads,
        dtype=model["dtype"],
    )


def _launch_times(
    executor: Backend, inputs: Mapping[str, Array], reset: Callable[[], None], rounds: int
) -> list[float]:
    """Milliseconds of each launch, medians over rounds."""
    runs = []
    for _ in range(rounds):
        reset()
        runs.append([seconds for _, seconds in executor.time_step(inputs)])
    return [statistics.median(times) * 1e3 for times in zip(*runs, strict=True)]


def _policy_share(launches: Sequence[Mapping[str, Any]], times: Sequence[float]) -> float:
    """The part of the launches that no module of the model stands behind: the step's own."""
    own = sum(ms for launch, ms in zip(launches, times, strict=True) if not launch["origin"])
    return own / sum(times)


def _parts(
    executor: Backend, medians: Sequence[float], work: Sequence[Work], machine: Machine
) -> list[Part]:
    """The step's time by kernel, longest first."""
    sums: dict[str, list[float]] = {}
    for launch, median, one in zip(executor.plan.launches, medians, work, strict=True):
        part = sums.setdefault(launch.kernel, [0.0, 0.0, 0.0])
        for i, value in enumerate((1.0, median, _floor(one, machine))):
            part[i] += value
    parts = [Part(kernel, int(n), ms, floor) for kernel, (n, ms, floor) in sums.items()]
    return sorted(parts, key=lambda p: -p.median)


def _floor(work: Work, machine: Machine) -> float:
    """Milliseconds at least; none of a launch that streams nothing, whose time is its overhead."""
    return work.seconds(machine) * 1e3 if work.streamed else 0.0


def _rival(name: str, checkpoint: Path, options: Options) -> tuple[Step, Tensor]:
    from dcompile.bench.eager import eager_step

    if name == "plain":
        from dcompile.frontends.checkpoint import open_checkpoint

        model = open_checkpoint(checkpoint, options.mask_id, options.block_length).reference()
        canvas = torch.zeros(1, options.max_length or 1, dtype=torch.int64)

        def full(inputs: Mapping[str, Tensor]) -> Tensor:
            end = int(inputs["row_limit"][0])
            with torch.no_grad():
                z = model(canvas[:, :end])[0, inputs["block_pos"][0]].float()
                return torch.softmax(z, -1).max(-1).indices

        return full, canvas
    if name not in ("eager", "compile", "full"):
        raise OptionError(f"no rival is called {name!r}", remedy=f"one of {', '.join(RIVALS)}")
    rival = eager_step(checkpoint, options)
    if name == "compile":
        rival = rival.compiled()
    return rival.step, rival.state["canvas"]
