"""Time and memory as window, context, batch, layers and experts grow: one axis at a time, one table.

python bench/speed/growth.py [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import models
import numpy as np

from dcompile.bench.command import prepare, step_inputs
from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner

BASE = models.Sizes(layers=4, hidden=512, heads=8, experts=16, top_k=2, inner=256, vocab=8192)
AXES = {
    "window": [8, 16, 32, 64, 128],
    "context": [128, 512, 2048, 8192],
    "batch": [1, 4, 16, 64],
    "layers": [2, 4, 8, 16, 32],
    "experts": [8, 32, 128, 256],
}


def point(axis: str, number: int) -> dict[str, float]:
    """Compile and time one configuration; all but `axis` as in BASE, window 32, context 256."""
    sizes = dataclasses.replace(BASE, **{axis: number}) if axis in ("layers", "experts") else BASE
    window = number if axis == "window" else 32
    context = number if axis == "context" else 256
    batch = number if axis == "batch" else 1
    with tempfile.TemporaryDirectory(prefix="dcompile-growth-") as name:
        folder = Path(name)
        checkpoint = models.write(folder / "checkpoint", sizes)
        start = time.perf_counter()
        artifact = compile_checkpoint(
            checkpoint,
            Options(max_length=context, block_length=window, batch=batch, cache="dual", threads=1),
            folder / "model.dcx",
        )
        compiled = time.perf_counter() - start
        runner = Runner.load(artifact)
        executor, plan = runner.executor, runner.artifact.plan
        one = step_inputs(
            list(plan.inputs),
            context,
            window,
            window,
            runner.artifact.manifest["policy"]["parameters"],
        )
        inputs = {k: np.concatenate([v] * batch) for k, v in one.items()}
        inputs["row_seq"] = np.arange(batch).repeat(window)
        inputs["block_seq"] = np.arange(batch)
        inputs["choice_row"] = one["choice_row"] + inputs["block_seq"][:, None] * window
        samples = []
        for _ in range(7):
            canvas = executor.state["canvas"]
            prepare(canvas, context, window, sizes.vocab - 1, sizes.vocab)
            canvas[1:batch] = canvas[:1]
            start = time.perf_counter()
            executor.step(inputs)
            samples.append((time.perf_counter() - start) * 1e3)
        binding = executor.bind(window * batch, batch)
        return {
            "compile_s": compiled,
            "artifact_mb": artifact.stat().st_size / 1e6,
            "ms_per_forward": statistics.median(samples[2:]),
            "us_per_row": statistics.median(samples[2:]) * 1e3 / (window * batch),
            "scratch_mb": binding.arena.nbytes / 1e6,
            "launches": len(plan.launches),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two points an axis")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    head = ("compile_s", "artifact_mb", "ms_per_forward", "us_per_row", "scratch_mb", "launches")
    print(f"{'':16}" + "".join(f"{h:>16}" for h in head))
    for axis, numbers in AXES.items():
        for number in numbers[:2] if given.quick else numbers:
            found = point(axis, number)
            rows.append({"axis": axis, "at": number, **found})
            print(f"{axis:9}{number:7}" + "".join(f"{found[h]:16.2f}" for h in head), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
