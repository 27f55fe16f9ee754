"""Per cent of the floor in `dcompile profile` beside kernels.py: the same kernels, shapes and probes.

    python bench/speed/floors.py [ARTIFACT] [--rounds N] [--json FILE]

Without an artifact, a random mixture of experts ("mid" of models.py, bfloat16) is compiled for it.  For
each kernel that reads weights or a cache: its launches in the windows of a generation, and calls of it
alone over copies of weights, in turn, so that what else the machine does slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import kernels
import models
import torch
from native import Library
from rich.console import Console
from rich.table import Table

from dcompile.codegen.cpu import build
from dcompile.cost.call import Call, Facts
from dcompile.cost.launches import costs, routers
from dcompile.cost.machine import Machine, measure
from dcompile.driver.compile import compile_checkpoint
from dcompile.ir.work import Work
from dcompile.options import Options
from dcompile.profile import profile_artifact
from dcompile.profile.collect import Capture
from dcompile.profile.watch import Timer
from dcompile.runtime.processor import cpu_flags

ARGUMENTS = {"gen_length": 64, "threshold": 1.0, "early_stop": False}


@dataclass(frozen=True)
class Shape:
    """Launches of one kernel over the same sizes, in the iterations `at` of a generation."""

    kernel: str
    sizes: tuple[int, ...]
    launches: list[int]
    at: list[int]


@dataclass(frozen=True)
class Compared:
    kernel: str
    shape: str
    profile: float
    """Floor over time: the median over launches and iterations."""
    alone: float


def artifact(folder: Path) -> Path:
    checkpoint = models.write(folder / "checkpoint", models.MID)
    options = Options(max_length=512, block_length=32, cache="dual", dtype="bfloat16")
    return compile_checkpoint(checkpoint, options, folder / "mid.dcx")


def shapes(capture: Capture, work: list[list[Work]]) -> Iterator[Shape]:
    """What the commonest kind of iteration runs, as far as it streams anything."""
    kinds = [(step.R, step.B) for step in capture.seen]
    common = statistics.mode(kinds)
    at = [i for i, kind in enumerate(kinds) if kind == common]
    plan, facts = capture.runner.artifact.plan.text, capture.facts(at[0])
    found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for index, launch in enumerate(plan["launches"]):
        if launch["where"] == "native" and work[at[0]][index].streamed:
            call = Call(plan, index, facts, None)
            found.setdefault((launch["kernel"], tuple(call.sizes)), []).append(index)
    for (kernel, sizes), launches in found.items():
        yield Shape(kernel, sizes, launches, at)


def case(shape: Shape, facts: Facts, router: int | None) -> kernels.Case | None:
    """The same kernel alone; None for those that kernels.py has not."""
    family, _, t = shape.kernel.rpartition("_")
    sizes, mid = shape.sizes, kernels.MODELS["mid"]
    if family == "linear":
        rows, n, k = sizes[-3:]
        return kernels.linear(mid, rows, t, n, k)
    if family == "moe_ffn":
        rows, d, f, experts, k = sizes[:5]
        model = replace(mid, hidden=d, width=f, experts=experts, chosen=k)
        chosen = None if router is None else facts.experts.get(router)
        experts = None if chosen is None else torch.from_numpy(chosen.copy()).view(rows, k).int()
        return kernels.moe(model, rows, t, experts=experts)
    if family == "attend" and sizes[1] == sizes[2]:
        rows, heads, _, d = sizes[:4]
        model, keys = replace(mid, heads=heads, head_size=d), int(facts.limits[0])
        return kernels.attend(model, rows, t, keys, written=min(facts.R, keys))
    if family == "vocab_choice":
        rows, _, v, d = sizes[:4]
        live = next(iter(facts.live.values()), rows)
        return kernels.vocab(replace(mid, hidden=d, vocab=v), rows, t, live=live)
    return None


def compare(capture: Capture, lib: Library, machine: Machine, rounds: int) -> Iterator[Compared]:
    plan = capture.runner.artifact.plan.text
    facts = [capture.facts(at) for at in range(len(capture.seen))]
    work = [costs(plan, each) for each in facts]
    for shape in shapes(capture, work):
        middle = shape.at[len(shape.at) // 2]
        made = case(shape, facts[middle], routers(plan)[shape.launches[0]])
        if made is None:
            continue
        inside, alone = [], []
        calls = made.calls
        alike = [at for at in shape.at if _live(facts[at]) == _live(facts[middle])]
        for turn in range(rounds):
            seconds = _generation(capture)
            inside += [
                work[at][launch].seconds(machine) / seconds[at][launch]
                for at in alike
                for launch in shape.launches
            ]
            for i in range(turn % len(calls), len(calls), min(rounds, len(calls))):
                made.before(i)
                (took,) = lib.run([(made.kernel, calls[i])], timed=True)
                alone.append(kernels.floor(made, machine) / took)
        sizes = " x ".join(map(str, shape.sizes[:5]))
        yield Compared(shape.kernel, sizes, statistics.median(inside), statistics.median(alone))


def _live(facts: Facts) -> int:
    """Candidates that are still undecided, in eighths of a block: what choosing tokens costs."""
    return sum(facts.live.values()) // 4


def _generation(capture: Capture) -> list[list[float]]:
    runner, request = capture.runner, capture.request
    runner.watch = timer = Timer(runner.executor)
    try:
        runner.generate(request.prompts, gen_length=request.gen_length, **dict(request.arguments))
    finally:
        runner.watch = None
    return [list(map(float, each.seconds)) for each in timer.iterations]


def table(rows: list[Compared]) -> Table:
    out = Table("kernel", "sizes", title="per cent of the floor, medians")
    for head in ("profile", "alone", "ratio"):
        out.add_column(head, justify="right")
    for r in rows:
        shares = (f"{100 * r.profile:.0f}", f"{100 * r.alone:.0f}", f"{r.profile / r.alone:.2f}")
        out.add_row(r.kernel, r.shape, *shares)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    isa = build.runnable(tuple(cpu_flags()))[0]
    lib = Library(build.build_library([isa])[isa])
    lib.set_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="dcompile-floors-") as folder:
        path = given.artifact or artifact(Path(folder))
        asked = dict(ARGUMENTS)
        length = int(asked.pop("gen_length"))
        capture = profile_artifact(path, [], length, asked, rounds=1, threads=given.threads)
        dtype = capture.runner.artifact.manifest["model"]["dtype"]
        machine = measure(dtype, given.threads)
        rows = list(compare(capture, lib, machine, given.rounds))
    console = Console(width=110)
    console.print(table(rows))
    speed = f"{isa}: {machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s"
    console.print(f"{speed}, {given.threads} thread(s)")
    if given.json:
        found = {"machine": asdict(machine), "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
