"""A compiled artifact through the runtime for GPUs, kernels interpreted: the tokens of the CPU's artifact."""

from __future__ import annotations

from pathlib import Path

import fake_cuda
import interpreter  # first of all
import torch
from checkpoints import write_checkpoint
from interpreted_gpu import InterpretedGpu

from dcompile.driver import compile_checkpoint
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.cuda.executor import CudaExecutor
from dcompile.runtime.loop import Runner

assert interpreter
PROMPTS = [[1, 2, 3, 4, 5], [3, 1, 4]]


def test_tokens_are_those_of_the_cpu(tmp_path: Path) -> None:
    """With the loop of a block inside a graph."""
    torch.set_num_threads(1)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llada_moe")
    given = Options(max_length=24, batch=2, block_length=4, cache="dual")
    cpu = compile_checkpoint(checkpoint, given, tmp_path / "cpu.dcx")
    made = compile_checkpoint(checkpoint, given.changed(target="cuda:sm_90"), tmp_path / "gpu.dcx")
    artifact = open_artifact(made)
    fake = fake_cuda.load(fake_cuda.build(tmp_path), tmp_path)
    gpu = InterpretedGpu(fake, tmp_path)
    gpu.add_artifact(artifact)
    executor = CudaExecutor(artifact, fake.device())
    asked = {"gen_length": 8, "early_stop": False, "threshold": 0.1}
    wanted = Runner.load(cpu).generate(PROMPTS, **asked)  # type: ignore[arg-type]
    with fake.raising():
        found = Runner(artifact, executor).generate(PROMPTS, **asked)  # type: ignore[arg-type]
    for one, other in zip(wanted, found, strict=True):
        assert (one.all_tokens, one.forwards) == (other.all_tokens, other.forwards)
    assert gpu.interpreted > 100 and executor.graph_launches
    assert any(line == "turn 1" for line in fake.log)
    assert len({token for result in found for token in result.all_tokens}) > 2
