"""The shipped model in float32: the GPU's artifact must decide the tokens of the CPU's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dcompile.demo import BATCH, BLOCK, GEN_LENGTH, MAX_LENGTH, MODEL, heldout
from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.cuda.executor import CudaExecutor
from dcompile.runtime.decode.loop import Runner
from gpu.machine import Machine


def run(machine: Machine, done: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tokens and forwards of the held-out prompts from both artifacts."""
    if "tokens" in done:
        return
    count, length, batch = (1, BLOCK, 1) if machine.dry else (64, GEN_LENGTH, BATCH)
    asked = {"threshold": 0.2} if machine.dry else {}
    prompts = [example.prompt for example in heldout()[:count]]
    options = Options(
        max_length=MAX_LENGTH, batch=batch, block_length=BLOCK, cache="dual", dtype="float32"
    )
    with tempfile.TemporaryDirectory() as folder:
        cpu = compile_checkpoint(MODEL, options, Path(folder) / "cpu.dcx")
        target = f"cuda:sm_{machine.device.arch}"
        gpu = compile_checkpoint(MODEL, options.changed(target=target), Path(folder) / "gpu.dcx")
        artifact = open_artifact(gpu)
        machine.interpret_artifact(artifact)
        executor = CudaExecutor(artifact, machine.device)
        with machine.raising():
            found = Runner(artifact, executor).generate(prompts, gen_length=length, **asked)
        wanted = Runner.load(cpu).generate(prompts, gen_length=length, **asked)
        executor.close()
    pairs = list(zip(found, wanted, strict=True))
    same = [a.all_tokens == b.all_tokens and a.forwards == b.forwards for a, b in pairs]
    seconds = sum(r.seconds for r in found)
    yield (
        "tokens",
        {"prompts": len(same), "identical": sum(same), "same": all(same), "seconds": seconds},
    )


def table(results: Mapping[str, Any]) -> list[str]:
    return [
        f"{r['identical']} of {r['prompts']} generations are identical to the CPU's, in float32"
        for r in results.values()
    ]
