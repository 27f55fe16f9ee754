"""Every kernel against float64, and its share of what memory or tensor cores allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from torch import Tensor

from dcompile.codegen.triton.aot import compile_variants
from dcompile.codegen.triton.tuned import Shape
from dcompile.codegen.triton.variant import Lowering
from dcompile.tuning.placed import FLUSH, Placed
from dcompile.tuning.problems import Problem
from gpu import choices
from gpu.machine import Machine
from gpu.references import reference
from gpu.rows import cases

SHAPES: Mapping[str, Mapping[str, int]] = {
    "llada_moe": {
        "hidden": 2048,
        "heads": 16,
        "groups": 16,
        "size": 128,
        "vocab": 157184,
        "experts": 64,
        "top": 8,
        "width": 1024,
    },
    "llada2_mini": {
        "hidden": 2048,
        "heads": 16,
        "groups": 4,
        "size": 128,
        "vocab": 157184,
        "experts": 256,
        "top": 8,
        "width": 512,
    },
    "llada_8b": {
        "hidden": 4096,
        "heads": 32,
        "groups": 32,
        "size": 128,
        "vocab": 126464,
        "ffn": 12288,
    },
}
TINY = {
    "tiny": {
        "hidden": 64,
        "heads": 2,
        "groups": 1,
        "size": 32,
        "vocab": 200,
        "experts": 4,
        "top": 2,
        "width": 32,
        "ffn": 64,
    }
}
BOUNDS = {"bf16": 8e-3, "f32": 1e-5}


def problems(sizes: Mapping[str, int], context: int, block: int, dtype: str) -> list[Problem]:
    """The products of one layer and of the choice of tokens."""
    d, h, g, size = (sizes[n] for n in ("hidden", "heads", "groups", "size"))
    found: list[tuple[str, dict[str, int], dict[str, int]]] = [
        ("linear", {"n": (h + 2 * g) * size, "k": d}, {}),
        ("linear", {"n": d, "k": h * size}, {}),
        ("attend", {"h": h, "g": g, "d": size}, {"positions": context}),
        ("vocab_choice", {"v": sizes["vocab"], "d": d}, {"length": block}),
    ]
    if "ffn" in sizes:
        found += [
            ("gated", {"n": sizes["ffn"], "k": d}, {}),
            ("linear", {"n": d, "k": sizes["ffn"]}, {}),
        ]
    if "experts" in sizes:
        for shared in (0, 1):
            widths = {"n": sizes["width"], "k": d, "e": sizes["experts"] + shared}
            found.append(("gate_up", widths, {"top": sizes["top"], "shared": shared}))
    return [Problem(Shape(f, tuple(s.items()), dtype), tuple(m.items())) for f, s, m in found]


def run(machine: Machine, done: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A result for each kernel of each model that is not in `done`, in bfloat16."""
    arch = machine.device.arch
    rows, context, block = (8, 64, 8) if machine.dry else (32, 4096, 32)
    flush = None if machine.dry else machine.device.allocate(FLUSH, "what clears the caches")
    dtypes = ("bf16",)
    for model, sizes in (TINY if machine.dry else SHAPES).items():
        for dtype in dtypes:
            for problem in problems(sizes, context, block, dtype):
                name = f"{model} {problem.shape.key}"
                if name in done:
                    continue
                lowering = problem.lowering(arch, problem.default(arch))
                operands = problem.operands(rows, machine.where)
                wanted = reference(problem, operands)
                work = _work(problem, operands, rows)
                symbols = problem.symbols(rows)
                yield (
                    name,
                    _measure(machine, lowering, operands, wanted, symbols, work, dtype, flush),
                )
                del operands, wanted
            given = (sizes, rows, machine.where, dtype)
            for case in (*cases(*given), *choices.cases(*given, arch)):
                name = f"{model} {case.name} {dtype}"
                if name in done:
                    continue
                wanted = case.reference(case.operands)
                moved = sum(t.numel() * t.element_size() for t in case.operands.values())
                work = (moved, case.flops)
                yield (
                    name,
                    _measure(
                        machine,
                        case.lowering,
                        case.operands,
                        wanted,
                        {"R": rows, "B": 1},
                        work,
                        dtype,
                        flush,
                    ),
                )
    if flush is not None:
        machine.device.wait()
        machine.device.free(flush)


def _measure(
    machine: Machine,
    lowering: Lowering,
    operands: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    symbols: Mapping[str, int],
    work: tuple[float, float],
    dtype: str,
    flush: int | None,
) -> dict[str, Any]:
    made = compile_variants([s.variant for s in lowering.steps], machine.device.arch)
    machine.interpret(made)
    placed = Placed(machine.device, lowering, made, operands, symbols)
    with machine.raising():
        placed.launch()
        away = {name: _distance(placed.result(name), value) for name, value in wanted.items()}
        times = sorted(placed.seconds(1 if machine.dry else machine.rounds, flush))
    seconds = times[len(times) // 2]
    placed.close()
    moved, flops = work
    floor = max(moved / machine.bandwidth, flops / machine.rate)
    return {
        "us": seconds * 1e6,
        "low": times[0] * 1e6,
        "high": times[-1] * 1e6,
        "launches": len(lowering.steps),
        "away": away,
        "right": all(x <= BOUNDS[dtype] for x in away.values()),
        "bytes": moved,
        "flops": flops,
        "share": floor / seconds,
        "bound": "bandwidth" if moved / machine.bandwidth >= flops / machine.rate else "rate",
    }


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Of floats the relative norm; of integers the share that differ."""
    wanted = wanted.cpu()
    if not found.is_floating_point():
        return float((found.long() != wanted.long()).double().mean())
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _work(problem: Problem, operands: Mapping[str, Tensor], rows: int) -> tuple[float, float]:
    """Bytes that must be read and FLOP; of experts only those that have tokens."""
    s, family = problem.sizes, problem.shape.family
    held = {n: t.numel() * t.element_size() for n, t in operands.items()}
    if family in ("gate_up", "down"):
        touched = len(operands["experts"].unique())
        weights = (held["gate_up"] + held["down"]) * touched / s["e"]
        small = sum(size for n, size in held.items() if n not in ("gate_up", "down"))
        return weights + small, 6.0 * rows * s["top"] * s["n"] * s["k"]
    if family == "attend":
        return float(sum(held.values())), 4.0 * rows * s["h"] * s["d"] * s["positions"]
    inner = prod(operands["w"].shape)
    count = operands["x"].numel() // operands["x"].shape[-1]
    return float(sum(held.values())), 2.0 * count * inner


def table(results: Mapping[str, Any]) -> list[str]:
    lines = [f"{'kernel':52}{'us':>9}{'share':>8}  bound      off float64"]
    for name, r in results.items():
        worst = max(r["away"].values())
        mark = "" if r["right"] else "  WRONG"
        lines.append(f"{name:52}{r['us']:9.1f}{r['share']:8.0%}  {r['bound']:10} {worst:.1e}{mark}")
    return lines
