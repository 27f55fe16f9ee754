"""A whole step at the sizes of real models, beside its floor, eager PyTorch, and torch.compile of that."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dcompile.runtime.cuda.memory import DeviceBinding
from dcompile.runtime.weights import DTYPES
from gpu import models
from gpu.machine import Machine
from gpu.models import Model
from gpu.rivals import Rival

BUDGET = 420.0  # seconds after which rivals are left for another run


def cells(machine: Machine) -> list[tuple[int, int, int]]:
    """(batch, window, context), the one that rivals run first."""
    if machine.dry:
        return [(1, 8, 64), (2, 16, 64)]
    return [(b, w, c) for b in (1, 8) for w in (32, 64) for c in (1024, 4096)]


def run(machine: Machine, done: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model at each batch, window and context; experts as drawn, and 48 and 32 of 64."""
    began = time.perf_counter()
    sizes = cells(machine)
    batch, length = max(b for b, _, _ in sizes), max(c for _, _, c in sizes)
    for name in models.TINY if machine.dry else models.REAL:
        limits: list[int | None] = [None]
        if name.endswith(("LLaDA-MoE", "LLaDA-MoE-7B-A1B")):
            limits += [4] if machine.dry else [48, 32]
        for touched in limits:
            wanted = sizes if touched is None else sizes[:1]
            suffix = "" if touched is None else f", {touched} experts"
            names = {_name(name, cell) + suffix: cell for cell in wanted}
            rivals = [f"{_name(name, sizes[0])}, {kind}" for kind in ("eager", "compile")]
            open_rivals = [r for r in rivals if r not in done] if touched is None else []
            if not open_rivals and all(n in done for n in names):
                continue
            with tempfile.TemporaryDirectory() as folder:
                model = models.build(machine, name, Path(folder), batch, length, touched)
                try:
                    for n, cell in names.items():
                        if n not in done:
                            yield n, measure(machine, model, *cell)
                    for rival in open_rivals:
                        if time.perf_counter() - began < BUDGET:
                            kind = rival.rpartition(" ")[2]
                            yield rival, Rival(model, *sizes[0]).measure(machine, kind == "compile")
                finally:
                    model.close()


def _name(model: str, cell: tuple[int, int, int]) -> str:
    return "{}, batch {}, window {}, context {}".format(model, *cell)


def measure(
    machine: Machine, model: Model, batch: int, window: int, context: int
) -> dict[str, Any]:
    """One iteration as one graph, on a canvas that is new each time."""
    executor = model.executor
    with machine.raising():
        binding = executor.fill(models.inputs(model, batch, window, context))

        def fresh() -> None:
            models.canvas(model, batch, context)
            host, place, size = binding.staging
            executor.device.upload(place, host, size)

        fresh()
        touched = touched_experts(model, binding)
        found = machine.milliseconds(lambda: executor.replay(binding, 1), fresh)
    moved, flops = floor(model, batch, window, context, touched)
    seconds = max(moved / machine.bandwidth, flops / machine.rate)
    layers = [launch["layer"] for launch in executor.plan.text["launches"]]
    per_layer = [layers.count(each) for each in set(layers) - {None}]
    return {
        **found,
        "floor_ms": seconds * 1e3,
        "ratio": found["ms"] / (seconds * 1e3),
        "bytes": moved,
        "flops": flops,
        "experts": touched,
        "launches": len(layers),
        "launches_a_layer": max(per_layer, default=0),
    }


def touched_experts(model: Model, binding: DeviceBinding) -> float:
    """Mean over the layers of how many experts one iteration reads; the iteration is run for it."""
    executor, counts, at = model.executor, [], 0
    buffers = executor.plan.buffers
    for index, launch in enumerate(executor.plan.launches):
        if not launch.kernel.startswith("route"):
            continue
        executor.launch(binding, part=(at, index + 1))
        at = index + 1
        (chosen,) = (w for w in launch.writes if w is not None and buffers[w].dtype == "i32")
        counts.append(len(np.unique(binding.values(chosen))))
    executor.launch(binding, part=(at, len(executor.plan.launches)))
    return float(np.mean(counts)) if counts else 0.0


def floor(
    model: Model, batch: int, window: int, context: int, touched: float
) -> tuple[float, float]:
    """Bytes that must be read and FLOP: weights, of experts those with tokens, and keys and values.

    The embedding's table and what is written are left out, as in `dcompile/floor.py`.
    """
    plan, rows = model.executor.plan, batch * window
    config_top = next((p for p in _top(plan)), 0)
    moved = flops = 0.0
    for launch in plan.launches:
        if launch.kernel.startswith(("gather", "canvas", "embedding")):
            continue
        for arg in launch.args:
            buffer = plan.buffers[arg["b"]] if "b" in arg else None
            if buffer is None or buffer.kind != "weight" or len(buffer.shape) < 2:
                continue
            shape = buffer.extent(1, 1)
            size, elements = DTYPES[buffer.dtype].itemsize, prod(shape)
            if len(shape) == 3:
                extra = shape[0] - model.experts  # shared ones, which every row runs
                moved += elements * size * (touched + extra) / shape[0]
                flops += 2 * rows * (config_top + extra) * elements / shape[0]
            elif buffer.dtype != "f32" or model.settled.options.dtype == "float32":
                moved += elements * size
                chosen = batch * plan.sizes["n"] if launch.kernel.startswith("vocab") else rows
                flops += 2 * chosen * elements
    for name in plan.holding("kv"):
        buffer = plan.buffers[plan.state[name]]
        row = buffer.bytes(1, 1) / (buffer.extent(1, 1)[0] * buffer.extent(1, 1)[1])
        moved += row * batch * max(0, context - window)
    return moved, flops


def _top(plan: Any) -> Iterator[int]:
    for launch in plan.launches:
        if launch.kernel.startswith("route"):
            for w in launch.writes:
                if plan.buffers[w].dtype == "i32":
                    yield plan.buffers[w].extent(1, 1)[-1]


def table(results: Mapping[str, Any]) -> list[str]:
    lines = [f"{'step':62}{'ms':>9}{'floor':>9}{'ratio':>7}{'experts':>9}"]
    for name, r in results.items():
        if "floor_ms" in r:
            lines.append(
                f"{name:62}{r['ms']:9.3f}{r['floor_ms']:9.3f}{r['ratio']:7.2f}{r['experts']:9.1f}"
            )
        else:
            lines.append(f"{name:62}{r['ms']:9.3f}")
    return lines
