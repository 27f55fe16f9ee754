"""The floor is one: no launch is faster than it; and experts are counted from the run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from native import Library, pack_args

from dcompile.bench.command import bench, masks, prepare, step_inputs
from dcompile.codegen import pack
from dcompile.codegen.cpu import build
from dcompile.cost.launches import costs
from dcompile.cost.looking import step_facts
from dcompile.cost.machine import Machine, last_cache, measure
from dcompile.driver.compile import compile_checkpoint
from dcompile.ir.work import Work
from dcompile.options import Options
from dcompile.profile.watch import Observer
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.processor import cpu_flags

NOISE = 1.15  # a bound measured beside other work may itself be a little low
TRIES = 6  # other work may slow the probe and not the product: a floor that is wrong fails them all


@pytest.fixture(scope="module")
def library() -> Library:
    isa = build.runnable(tuple(cpu_flags()))[0]
    library = Library(build.build_library([isa])[isa])
    library.set_threads(1)
    return library


def best_seconds(
    library: Library, rows: int, n: int, k: int, dtype: torch.dtype, copies: int = 1
) -> float:
    """The fastest of many runs of a product, each with the next of so many copies of its weights."""
    x, w = torch.ones(rows, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    y, packed = torch.empty(rows, n, dtype=dtype), pack.pack_linear(w)
    held = [packed, *(packed.clone() for _ in range(copies - 1))]
    args = [pack_args([y, x, weights, None, None, rows, n, k]) for weights in held]
    kernel = library.kernel({torch.float32: "linear_f32", torch.bfloat16: "linear_bf16"}[dtype])
    times = []
    for turn in range(max(20, copies)):
        start = time.perf_counter()
        kernel(args[turn % copies])
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_beats_the_rate(library: Library, dtype: torch.dtype) -> None:
    """Weights from memory or not: so many multiply-adds take at least so long."""
    rows, n, k = 48, 512, 512

    def below() -> bool:
        floor = 2 * rows * n * k / measure(str(dtype).removeprefix("torch."), 1).rate
        return floor <= NOISE * best_seconds(library, rows, n, k, dtype)

    assert any(below() for _ in range(TRIES))


def test_no_reading_beats_the_bandwidth(library: Library) -> None:
    """One row, and weights that no cache holds: its time is that of reading them."""
    n, k = 1 << 16, 1024
    copies = 1 + 3 * last_cache() // (2 * n * k)

    def below() -> bool:
        floor = 2 * n * k / measure("bfloat16", 1).bandwidth
        return floor <= NOISE * best_seconds(library, 1, n, k, torch.bfloat16, copies)

    assert any(below() for _ in range(TRIES))


def test_a_launch_is_bound_by_the_slower_of_both() -> None:
    machine = Machine(bandwidth=10.0, rate=100.0)
    assert Work(bytes=900, flops=10, streamed=50).seconds(machine) == 5.0
    assert Work(bytes=5, flops=1000, streamed=5).seconds(machine) == 10.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("floor")
    folder = write_checkpoint(root / "checkpoint", "llada_moe")
    options = Options(max_length=32, block_length=8, cache="dual")
    return folder, compile_checkpoint(folder, options, root / "model.dcx")


def test_experts_are_counted_from_the_run(made: tuple[Path, Path]) -> None:
    """The same numbers as one who looks on sees, and the floor counts their bytes."""
    runner = Runner.load(made[1])
    executor, manifest = runner.executor, runner.artifact.manifest
    model = manifest["model"]
    inputs = step_inputs(list(executor.plan.inputs), 32, 8, 8, manifest["policy"]["parameters"])
    binding = executor.fill(inputs)
    canvas = executor.state["canvas"]
    prepare(canvas, 32, 8, model["mask_id"], model["vocab_size"])
    facts = step_facts(executor, executor.plan.text, binding)
    layers = {
        index: launch.args[3]["b"]
        for index, launch in enumerate(executor.plan.launches)
        if launch.kernel.startswith("moe_ffn_")
    }
    observer = Observer(executor, layers)
    prepare(canvas, 32, 8, model["mask_id"], model["vocab_size"])
    observer.launch(binding, {})
    (seen,) = observer.iterations
    work = costs(executor.plan.text, facts)
    touched = [work[i].touched for i in layers]
    assert touched and touched == [len(set(seen.probes[i].flat)) for i in layers]
    one = {at: np.zeros_like(experts) for at, experts in facts.experts.items()}
    fewer = costs(executor.plan.text, replace(facts, experts=one))
    for i, count in zip(layers, touched, strict=True):
        assert work[i].streamed == pytest.approx(fewer[i].streamed * count)
    assert list(facts.live.values()) == [masks(8)]


def test_the_table_has_every_contestant_and_kernel(made: tuple[Path, Path]) -> None:
    folder, artifact = made
    table = bench(artifact, ["eager"], folder, rounds=2, threads=1)
    assert [row.name for row in table.rows] == ["artifact", "eager"]
    runner = Runner.load(artifact)
    assert {p.kernel for p in table.parts} == {n.kernel for n in runner.executor.plan.launches}
    assert sum(p.launches for p in table.parts) == len(runner.executor.plan.launches)
    assert sum(p.floor for p in table.parts) == pytest.approx(table.floor)
    assert "x floor" in table.text() and table.json()["rows"][1]["name"] == "eager"
