"""Kernel times against the machine's floor and against torch, side by side in one process.

    python bench/speed/kernels.py [--threads 1 2] [--rows 8 32 64] [--only moe] [--contexts 128 8192]
                                  [--json FILE]

The floor of a call is max(bytes / bandwidth, FLOPs / rate) by the probes of dcompile/cost/machine.py, measured
here just before, and its bytes those of weights and caches, as `dcompile profile` counts them (floors.py
compares the two); where there are none, all that is read and written. Weights are rotated through copies
larger than the caches; kernel and torch take turns, and the medians stand in the table, with the quartiles
of the kernel's times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from native import Library, Value, pack_args

from dcompile.codegen import pack
from dcompile.codegen.cpu import build
from dcompile.cost.machine import Machine, measure
from dcompile.runtime.archive import map_file
from dcompile.runtime.processor import cpu_flags

TYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
ROTATED_BYTES = 600e6  # larger than the last cache; the copies of a case together have this size


@dataclass(frozen=True)
class Model:
    hidden: int
    heads: int
    head_size: int
    experts: int
    chosen: int
    width: int
    vocab: int
    context: int = 1024


MODELS = {
    "mid": Model(1024, 16, 64, 32, 4, 512, 32768),
    "wide": Model(2048, 16, 128, 64, 8, 1024, 32768),
}


@dataclass(frozen=True)
class Case:
    """A kernel with its arguments, one list for each copy of the weights, and torch's way."""

    name: str
    kernel: str
    calls: list[list[Value]]
    eager: Callable[[int], object]
    bytes: float
    macs: float
    before: Callable[[int], object] = lambda i: None
    """What the step has just written when it calls the kernel."""


@dataclass(frozen=True)
class Result:
    model: str
    dtype: str
    threads: int
    rows: int
    name: str
    seconds: float
    low: float
    high: float
    torch_seconds: float
    floor: float


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def copies(nbytes: float) -> int:
    return max(1, min(64, int(ROTATED_BYTES / nbytes)))


def as_mapped(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same in one mapped file, as an artifact's weights are: pages are not read at the same speed."""
    sizes = [t.numel() * t.element_size() for t in tensors]
    with tempfile.NamedTemporaryFile() as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        for t in tensors:
            file.write(t.contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        parts = torch.frombuffer(map_file(Path(file.name)), dtype=torch.uint8).split(sizes)
    return [p.view(t.dtype).view(t.shape) for p, t in zip(parts, tensors, strict=True)]


def as_state(t: torch.Tensor) -> torch.Tensor:
    """The same in memory as the runtime's states have it, in large pages where the system gives them."""
    held = np.empty(t.numel() * t.element_size(), dtype=np.uint8)
    return torch.from_numpy(held).view(t.dtype).view(t.shape).copy_(t)


# ---- the cases


def linear(m: Model, R: int, t: str, N: int = 0, K: int = 0) -> Case:
    N, K = N or 3 * m.hidden, K or m.hidden
    n = copies(N * K * TYPES[t].itemsize)
    ws = [torch.randn(N, K).to(TYPES[t]) for _ in range(n)]
    x, y = torch.randn(R, K).to(TYPES[t]), torch.empty(R, N, dtype=TYPES[t])
    packed = as_mapped([pack.pack_linear(w) for w in ws])
    calls: list[list[Value]] = [[y, x, w, None, None, R, N, K] for w in packed]
    size = TYPES[t].itemsize
    return Case(
        "linear qkv",
        f"linear_{t}",
        calls,
        lambda i: F.linear(x, ws[i]),
        size * N * K,
        R * N * K,
    )


def moe(
    m: Model, R: int, t: str, touched: int | None = None, experts: torch.Tensor | None = None
) -> Case:
    D, W, E, k = m.hidden, m.width, m.experts, m.chosen
    size = TYPES[t].itemsize
    n = copies(E * 3 * D * W * size)
    gate_up = [(torch.randn(E, 2 * W, D) * D**-0.5).to(TYPES[t]) for _ in range(n)]
    down = [(torch.randn(E, D, W) * W**-0.5).to(TYPES[t]) for _ in range(n)]
    x, y = torch.randn(R, D).to(TYPES[t]), torch.empty(R, D, dtype=TYPES[t])
    pool = torch.randperm(E)[: touched or E]
    if experts is None:
        experts = torch.stack([pool[torch.randperm(len(pool))[:k]] for _ in range(R)]).int()
    routed = experts
    touched_experts = sorted(set(experts.flatten().tolist()))
    weights = torch.rand(R, k)
    shape = (R, D, W, E, k, 0)
    packed = as_mapped(
        [pack.pack_experts(w) for pair in zip(gate_up, down, strict=True) for w in pair]
    )
    calls: list[list[Value]] = [
        [y, x, weights, experts, g, d, None, None, *shape]
        for g, d in zip(packed[::2], packed[1::2], strict=True)
    ]

    def eager(i: int) -> torch.Tensor:
        out = torch.zeros(R, D)
        for e in touched_experts:
            rows, rank = (routed == e).nonzero(as_tuple=True)
            g, u = F.linear(x[rows], gate_up[i][e]).chunk(2, -1)
            v = F.linear(F.silu(g) * u, down[i][e])
            out.index_add_(0, rows, v.float() * weights[rows, rank, None])
        return out.to(TYPES[t])

    read = len(touched_experts)
    return Case(
        f"moe_ffn ({read} experts)",
        f"moe_ffn_{t}",
        calls,
        eager,
        size * read * 3 * D * W,
        R * k * 3 * D * W,
    )


def attend(m: Model, R: int, t: str, context: int | None = None, written: int = 0) -> Case:
    """Of the keys and values, the last `written` come from a cache."""
    H, D, L = m.heads, m.head_size, context or m.context
    size = TYPES[t].itemsize
    n = copies(2 * L * H * D * size)
    q, o = torch.randn(R, H, D).to(TYPES[t]), torch.empty(R, H, D, dtype=TYPES[t])
    ks, vs = ([as_state(torch.randn(1, L, H, D).to(TYPES[t])) for _ in range(n)] for _ in "kv")
    seq, limit = torch.zeros(R, dtype=torch.long), torch.full((R,), L)
    calls: list[list[Value]] = [
        [o, q, k, v, seq, limit, R, H, H, D, L, D**-0.5] for k, v in zip(ks, vs, strict=True)
    ]

    def eager(i: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], ks[i].transpose(1, 2), vs[i].transpose(1, 2)
        )

    def write(i: int) -> None:
        for held in (ks[i], vs[i]):
            held[:, L - written :].mul_(1)

    moved = size * 2 * (L - written) * H * D
    return Case(f"attend {L}", f"attend_{t}", calls, eager, moved, 2 * R * L * H * D, write)


def vocab(m: Model, R: int, t: str, temperature: float = 0.0, live: int | None = None) -> Case:
    D, V, live = m.hidden, m.vocab, R if live is None else live
    size = TYPES[t].itemsize
    n = copies(V * D * size)
    ws = [(torch.randn(V, D) * D**-0.5).to(TYPES[t]) for _ in range(n)]
    x = torch.randn(R, D).to(TYPES[t])
    token, outs = torch.empty(R, dtype=torch.long), [torch.empty(R) for _ in range(3)]
    asked, zero = (torch.arange(R) < live).to(torch.uint8), torch.zeros(1, dtype=torch.long)
    tail = (asked, torch.tensor([temperature]), zero, zero, torch.arange(R), R, 1, V, D, V - 1)
    packed = as_mapped([pack.pack_linear(w) for w in ws])
    calls: list[list[Value]] = [[token, *outs, x, w, None, *tail] for w in packed]

    def eager(i: int) -> object:
        z = F.linear(x, ws[i]).float()
        z[:, V - 1] = -torch.inf
        p = z.softmax(-1)
        if temperature:
            z = z / temperature - torch.log(-torch.log(torch.rand_like(z)))
        return p.gather(1, z.argmax(-1, keepdim=True)), p.topk(2), -(p * p.log()).nansum(-1)

    name = "vocab_choice" + (" noisy" if temperature else "")
    return Case(name, f"vocab_choice_{t}", calls, eager, size * V * D, live * V * D)


def rms_norm(m: Model, R: int, t: str) -> Case:
    D = m.hidden
    x, r = torch.randn(R, D).to(TYPES[t]), torch.randn(R, D).to(TYPES[t])
    w, s, y = torch.ones(D, dtype=TYPES[t]), torch.empty_like(x), torch.empty_like(x)
    args: list[Value] = [s, y, x, r, w, R, D, 1e-5]
    return Case(
        "add_rms_norm",
        f"add_rms_norm_{t}",
        [args],
        lambda i: F.rms_norm(x + r, (D,), w, 1e-5),
        TYPES[t].itemsize * 4 * R * D,
        0,
    )


def rope(m: Model, R: int, t: str) -> Case:
    H, D, L = m.heads, m.head_size, m.context
    qkv, q = torch.randn(R, 3 * H * D).to(TYPES[t]), torch.empty(R, H, D, dtype=TYPES[t])
    keys, values = torch.empty(1, L, H, D, dtype=TYPES[t]), torch.empty(1, L, H, D, dtype=TYPES[t])
    cos, sin, w = torch.randn(L, D), torch.randn(L, D), torch.ones(D, dtype=TYPES[t])
    seq, pos = torch.zeros(R, dtype=torch.long), torch.arange(R)
    args: list[Value] = [q, keys, values, qkv, w, w, cos, sin, seq, pos, R, H, H, D, L, D, 1e-5]

    def eager(i: int) -> None:
        a, b, v = qkv.view(R, 3, H, D).unbind(1)
        for x, to in ((a, q), (b, keys[0, :R])):
            n = F.rms_norm(x, (D,), w, 1e-5)
            turned = torch.cat([-n[..., D // 2 :], n[..., : D // 2]], -1)
            to.copy_(n * cos[pos, None] + turned * sin[pos, None])
        values[0, pos] = v

    nbytes = TYPES[t].itemsize * 6 * R * H * D
    return Case("norm_rope_write", f"norm_rope_write_{t}", [args], eager, nbytes, 0)


def route(m: Model, R: int, t: str) -> Case:
    E, k = m.experts, m.chosen
    logits = torch.randn(R, E)
    weights, experts = torch.empty(R, k), torch.empty(R, k, dtype=torch.int32)
    args: list[Value] = [weights, experts, logits, None, R, E, k, 0, 1, 1, 1, 1.0]

    def eager(i: int) -> torch.Tensor:
        w, _ = logits.softmax(-1).topk(k)
        return w / w.sum(-1, keepdim=True)

    return Case("route", "route", [args], eager, 4 * R * (E + 2 * k), 0)


CASES: list[Callable[[Model, int, str], Case]] = [
    *(linear, moe, attend, vocab, lambda m, R, t: vocab(m, R, t, 0.7), rms_norm, rope, route)
]


# ---- timing


def compare(lib: Library, case: Case, budget: float) -> tuple[list[float], float]:
    """Quartiles of the kernel's seconds and torch's median, taking turns."""
    kernel = lib.kernel(case.kernel)
    calls = [pack_args(values) for values in case.calls]
    kernel(calls[0]), case.eager(0)
    ours: list[float] = []
    theirs: list[float] = []
    end = time.perf_counter() + budget
    turn = 0
    while len(ours) < 7 or (time.perf_counter() < end and len(ours) < 200):
        i = turn % len(calls)
        ours.append(seconds(lambda: kernel(calls[i])))  # noqa: B023
        j = (turn + len(calls) // 2) % len(calls)
        theirs.append(seconds(lambda: case.eager(j)))  # noqa: B023
        turn += 1
    return statistics.quantiles(ours, n=4), statistics.median(theirs)


def floor(case: Case, machine: Machine) -> float:
    return max(case.bytes / machine.bandwidth, 2 * case.macs / machine.rate)


def experts_line(lib: Library, m: Model, t: str, budget: float) -> str:
    """moe_ffn's time over the number of experts touched, 32 rows, and the line through it."""
    counts = [c for c in (m.chosen, m.experts // 4, m.experts // 2, m.experts) if c >= m.chosen]
    times = [compare(lib, moe(m, 32, t, c), budget)[0][1] * 1e3 for c in counts]
    points = torch.tensor(counts, dtype=torch.double)
    system = torch.stack([points, torch.ones_like(points)], 1)
    slope, start = torch.linalg.lstsq(system, torch.tensor(times)[:, None].double()).solution
    each = 3 * m.hidden * m.width * TYPES[t].itemsize
    listed = ", ".join(f"{c}: {ms:.2f}" for c, ms in zip(counts, times, strict=True))
    speed = each / float(slope) / 1e6
    return (
        f"moe_ffn {t}, 32 rows, ms by experts touched: {listed}; "
        f"{float(start):.2f} + {float(slope):.4f} ms an expert = {speed:.1f} GB/s"
    )


def table(results: list[Result]) -> Table:
    out = Table("model", "dtype", "threads", "rows", "kernel", title="median times")
    for title in ("us", "quartiles", "floor us", "x floor", "torch us", "x torch"):
        out.add_column(title, justify="right")
    for r in results:
        out.add_row(
            *(r.model, r.dtype, str(r.threads), str(r.rows), r.name),
            *(f"{r.seconds * 1e6:.0f}", f"{r.low * 1e6:.0f}..{r.high * 1e6:.0f}"),
            *(f"{r.floor * 1e6:.0f}", f"{r.seconds / r.floor:.2f}"),
            *(f"{r.torch_seconds * 1e6:.0f}", f"{r.torch_seconds / r.seconds:.2f}"),
        )
    return out


def cases(name: str, t: str, given: argparse.Namespace) -> Iterator[tuple[int, Case]]:
    """What the options ask for, made one after the other from the same seed."""
    for make in CASES:
        probe = make.__name__ if make.__name__ != "<lambda>" else "vocab noisy"
        if given.only not in probe:
            continue
        for rows in given.rows:
            torch.manual_seed(0)
            yield rows, make(MODELS[name], rows, t)
            for context in given.contexts if make is attend else ():
                yield rows, attend(MODELS[name], rows, t, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="more, for attend")
    parser.add_argument("--models", nargs="+", default=["mid"], choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--isa", help="variant; the best that runs here unless given")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds a case")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    console = Console(width=130)
    isa = given.isa or build.runnable(tuple(cpu_flags()))[0]
    lib = Library(build.build_library([isa])[isa])
    results: list[Result] = []
    lines: list[str] = []
    for threads in given.threads:
        lib.set_threads(threads)
        torch.set_num_threads(threads)
        for name, t in product(given.models, given.dtypes):
            machine = measure(str(TYPES[t]).removeprefix("torch."), threads)
            speed = f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s"
            lines.append(f"{isa}, {t}, threads {threads}: {speed}")
            for rows, case in cases(name, t, given):
                (low, median, high), theirs = compare(lib, case, given.budget)
                times = (median, low, high, theirs, floor(case, machine))
                results.append(Result(name, t, threads, rows, case.name, *times))
            if given.only in "moe_ffn":
                lines.append(experts_line(lib, MODELS[name], t, given.budget))
    console.print(table(results))
    for line in lines:
        console.print(line, soft_wrap=True)
    if given.json:
        report = {"lines": lines, "results": [asdict(r) for r in results]}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
