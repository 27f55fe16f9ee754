"""What a committed token of the shipped model costs, and where the time goes: host, kernels, cache.

    python bench/speed/cost.py [--count 64] [--block 8] [--rounds 3] [--json FILE]

Three ways to the same tokens by the same policy, one prompt at a time, in turn: the plain model without a
cache; the artifact over all rows (`none`: the same rows, other kernels and host); the artifact over the
block's rows (`dual`: fewer rows).  The kernels' share is timed launch by launch in a run of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dcompile.demo import GEN_LENGTH, MAX_LENGTH, MODEL, heldout
from dcompile.driver.compile import compile_checkpoint
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.profile.watch import Timer
from dcompile.runtime.decode.loop import Runner
from dcompile.step.plain_decode import plain_decode

Decode = Callable[[list[int]], tuple[list[int], int]]


@dataclass(frozen=True)
class Cost:
    """Microseconds a committed token, median over the rounds; `host` is what launches do not take."""

    name: str
    token: float
    host: float | None
    forwards: float
    same: int


def artifact_decode(runner: Runner, threshold: float) -> Decode:
    def decode(ids: list[int]) -> tuple[list[int], int]:
        (result,) = runner.generate([ids], gen_length=GEN_LENGTH, threshold=threshold)
        return list(result.all_tokens), result.forwards

    return decode


def host_share(runner: Runner, prompts: Sequence[list[int]], decode: Decode) -> float:
    """The part of a generation's time that no launch takes."""
    runner.watch = timer = Timer(runner.executor)
    start, launched = time.perf_counter(), 0.0
    for ids in prompts:
        timer.restart()
        decode(ids)
        launched += sum(float(each.seconds.sum()) for each in timer.iterations)
    runner.watch = None
    return 1 - launched / (time.perf_counter() - start)


def measure(count: int, block: int, rounds: int, threshold: float) -> list[Cost]:
    checkpoint = open_checkpoint(MODEL)
    model, spec = checkpoint.reference(), checkpoint.spec

    def plain(ids: list[int]) -> tuple[list[int], int]:
        found = plain_decode(model, spec, ids, GEN_LENGTH, block, threshold=threshold)
        return found.tokens, found.forwards

    ways: dict[str, Decode] = {"plain": plain}
    runners: dict[str, Runner] = {}
    with tempfile.TemporaryDirectory() as name:
        for cache in ("none", "dual"):
            options = Options(max_length=MAX_LENGTH, block_length=block, cache=cache)
            path = compile_checkpoint(MODEL, options, Path(name) / f"{cache}.dcx")
            runners[cache] = Runner.load(path, threads=1)
            ways[cache] = artifact_decode(runners[cache], threshold)
        prompts = [runners["none"].tokenizer.encode(e.prompt, False) for e in heldout()[:count]]
        times: dict[str, list[float]] = {name: [] for name in ways}
        found = {name: [decode(ids) for ids in prompts] for name, decode in ways.items()}
        for _ in range(rounds):
            for name, decode in ways.items():
                start = time.perf_counter()
                for ids in prompts:
                    decode(ids)
                times[name].append(time.perf_counter() - start)
        hosts = {name: host_share(r, prompts, ways[name]) for name, r in runners.items()}
    tokens = sum(_committed(t, spec.eos_ids) for t, _ in found["plain"])
    return [
        Cost(
            name=name,
            token=(token := statistics.median(times[name]) / tokens * 1e6),
            host=token * hosts[name] if name in hosts else None,
            forwards=statistics.mean(forwards for _, forwards in found[name]),
            same=sum(a[0] == b[0] for a, b in zip(found[name], found["plain"], strict=True)),
        )
        for name in ways
    ]


def _committed(tokens: list[int], ends: tuple[int, ...]) -> int:
    return next((i for i, t in enumerate(tokens) if t in ends), len(tokens))


def text(costs: list[Cost], count: int) -> str:
    plain, none, dual = costs
    lines = [f"{'':8}{'us/token':>10}{'host':>8}{'kernels':>9}{'NFE':>7}{'same':>10}{'x':>7}"]
    for c in costs:
        split = f"{'':17}" if c.host is None else f"{c.host:8.0f}{c.token - c.host:9.0f}"
        same = f"{c.same}/{count}"
        ratio = plain.token / c.token
        lines.append(f"{c.name:8}{c.token:10.0f}{split}{c.forwards:7.2f}{same:>10}{ratio:7.2f}")
    lines.append(
        f"{plain.token / dual.token:.2f} x in all: kernels and host {plain.token / none.token:.2f} x, "
        f"cache {none.token / dual.token:.2f} x"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    costs = measure(given.count, given.block, given.rounds, given.threshold)
    print(text(costs, given.count))
    if given.json:
        given.json.write_text(json.dumps([asdict(c) for c in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()
