"""What a block costs beside its kernels: a turn of the loop on the device, and the host's work."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpu import models
from gpu.machine import Machine

TURNS = 200


def run(machine: Machine, done: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """An empty loop's turn, and whole blocks of the first model."""
    name = next(iter(models.TINY if machine.dry else models.REAL))
    if {"empty loop", "a block"} <= done.keys():
        return
    block, context = (8, 64) if machine.dry else (32, 1024)
    with tempfile.TemporaryDirectory() as folder:
        model = models.build(machine, name, Path(folder), 1, context)
        try:
            if model.executor.loops:
                yield "empty loop", _empty(machine, model, block, context)
            yield "a block", _block(machine, model, block, context)
        finally:
            model.close()


def _empty(machine: Machine, model: models.Model, block: int, context: int) -> dict[str, Any]:
    """A graph whose loop holds nothing but the end of a turn, run for one turn and for many."""
    executor = model.executor
    machine.interpret_artifact(_as_artifact(model), only=["advance", *_advance(model)])
    binding = executor.fill(models.inputs(model, 1, block, context))
    graph = executor.loop_over(binding, [])
    done = executor.plan.outputs["done"]
    size = executor.plan.buffers[done].bytes(binding.R, binding.B)
    executor.device.fill(binding.address(done), 0, size)
    times = {}
    with machine.raising():
        for turns in (1, TURNS):
            for counter in binding.counters.values():
                counter.fill(0)
            binding.counters["limit"].fill(turns)
            times[turns] = machine.milliseconds(graph.launch)["ms"]
            assert (
                int(binding.returned["turn"][0] if "turn" in binding.returned else turns) == turns
            )
    graph.close()
    return {"us_a_turn": (times[TURNS] - times[1]) / (TURNS - 1) * 1e3, "us_alone": times[1] * 1e3}


def _block(machine: Machine, model: models.Model, block: int, context: int) -> dict[str, Any]:
    """Iterations of a block as one launch: what the host does beside, per block and per turn."""
    executor = model.executor
    given = models.inputs(model, 1, block, context)
    if "threshold" in given:
        given["threshold"] = np.ones(1, np.float32)
    hosts, walls, turns = [], [], 0
    begin, end = executor.device.event(), executor.device.event()
    with machine.raising():
        for turn in range(machine.rounds + 3):
            models.canvas(model, 1, context)
            binding = executor.fill(given)
            executor.device.wait()
            limit = 4 if machine.dry else block
            before = executor.graph_launches
            start = time.perf_counter()
            executor.device.record(begin)
            found = executor.repeat(binding, limit)
            executor.device.record(end)
            wall = time.perf_counter() - start
            executor.device.wait()
            if turn >= 3:
                hosts.append(max(0.0, wall - executor.device.seconds(begin, end)))
                walls.append(wall)
            turns = found.performed[0]
            launches = executor.graph_launches - before
    for event in (begin, end):
        executor.device.driver.call("cuEventDestroy_v2", event)
    middle = len(hosts) // 2
    return {
        "turns": turns,
        "graph_launches": launches,
        "host_us": sorted(hosts)[middle] * 1e6,
        "wall_ms": sorted(walls)[middle] * 1e3,
        "loop_on_device": executor.loops,
    }


def _advance(model: models.Model) -> list[str]:
    loop = model.executor.plan.loop
    return [loop.kernel] if loop is not None else []


def _as_artifact(model: models.Model) -> Any:
    return models._artifact(model.code, model.settled.options)


def table(results: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in r.items()) for name, r in results.items()
    ]
