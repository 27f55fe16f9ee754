"""A LLaDA-MoE-7B-A1B-shaped checkpoint with random weights: compile it, decode one block, print what it took.

    python bench/speed/full_size.py [--folder DIR] [--layers 16]

Writes 14.7 GB of checkpoint and as much of artifact; fits a machine with 24 GiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import models
import torch

CONTEXT, BLOCK = 256, 32


def peak() -> float:
    """GiB of memory that this process had resident at most, mapped file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def anonymous() -> float:
    """GiB of memory of this process that is no mapped file."""
    text = Path("/proc/self/status").read_text()
    line = next(x for x in text.splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) / 2**20


def compile_part(checkpoint: Path, artifact: Path) -> dict[str, float]:
    from dcompile.driver.compile import compile_checkpoint
    from dcompile.options import Options

    highest = 0.0

    def watch() -> None:
        nonlocal highest
        highest = max(highest, anonymous())

    import threading

    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.05):
            watch()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    start = time.perf_counter()
    compile_checkpoint(
        checkpoint, Options(max_length=CONTEXT, block_length=BLOCK, cache="dual"), artifact
    )
    took = time.perf_counter() - start
    stop.set()
    thread.join()
    size = artifact.stat().st_size / 1e9
    return {
        "compile_s": took,
        "peak_anonymous_gib": highest,
        "peak_resident_gib": peak(),
        "artifact_gb": size,
    }


def run_part(artifact: Path, threads: int) -> dict[str, float]:
    from dcompile.bench.command import prepare, step_inputs
    from dcompile.cost.launches import costs
    from dcompile.cost.looking import step_facts
    from dcompile.cost.machine import measure
    from dcompile.runtime.decode.loop import Runner

    start = time.perf_counter()
    runner = Runner.load(artifact, verify=False, threads=threads)
    load = time.perf_counter() - start
    vocab = runner.artifact.manifest["model"]["vocab_size"]
    prompt = torch.randint(
        0, vocab - 8, (CONTEXT - BLOCK,), generator=torch.Generator().manual_seed(0)
    )
    start = time.perf_counter()
    (result,) = runner.generate(
        [prompt.tolist()], gen_length=BLOCK, threshold=0.9, early_stop=False
    )
    block = time.perf_counter() - start
    plan, manifest = runner.artifact.plan, runner.artifact.manifest
    inputs = step_inputs(list(plan.inputs), CONTEXT, BLOCK, BLOCK, manifest["policy"]["parameters"])
    samples = []
    for _ in range(5):
        prepare(
            runner.executor.state["canvas"], CONTEXT, BLOCK, manifest["model"]["mask_id"], vocab
        )
        start = time.perf_counter()
        runner.executor.step(inputs)
        samples.append((time.perf_counter() - start) * 1e3)
    machine = measure("bfloat16", threads)
    facts = step_facts(runner.executor, plan.text, runner.executor.fill(inputs))
    floor = sum(w.seconds(machine) for w in costs(plan.text, facts) if w.streamed) * 1e3
    forward = statistics.median(samples)
    return {
        "load_s": load,
        "block_s": block,
        "forwards": result.forwards,
        "ms_per_forward": forward,
        "floor_ms": floor,
        "x_floor": forward / floor,
        "bandwidth_gb_s": machine.bandwidth / 1e9,
        "rate_gflop_s": machine.rate / 1e9,
        "peak_anonymous_gib": anonymous(),
        "peak_resident_gib": peak(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=models.FULL.layers)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=["compile", "run"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.part:
        folder = given.folder
        checkpoint, artifact = folder / "checkpoint", folder / "model.dcx"
        part = (
            compile_part(checkpoint, artifact)
            if given.part == "compile"
            else run_part(artifact, given.threads)
        )
        print(json.dumps(part))
        return
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dcompile-full-", dir=given.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        sizes = dataclasses.replace(models.FULL, layers=given.layers)
        models.write(folder / "checkpoint", sizes)
        print(f"checkpoint written in {time.perf_counter() - start:.0f} s", flush=True)
        found = {}
        for part in ("compile", "run"):
            # A process each, so that peak memory is its own.
            command = [sys.executable, __file__, "--folder", name, "--part", part]
            command += ["--threads", str(given.threads)]
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode:
                sys.exit(out.stderr)
            found[part] = json.loads(out.stdout.splitlines()[-1])
            for key, number in found[part].items():
                print(f"{part:8} {key:22} {number:10.2f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"layers": given.layers, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
