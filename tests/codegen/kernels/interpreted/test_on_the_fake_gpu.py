"""A compiled artifact through the runtime for GPUs, kernels interpreted: the tokens of the CPU's artifact."""

from __future__ import annotations

from pathlib import Path

import fake_cuda
import interpreter  # first of all
import pytest
import torch
from checkpoints import write_checkpoint
from fake_cuda import FakeCuda
from interpreted_gpu import InterpretedGpu

from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.cuda.executor import CudaExecutor
from dcompile.runtime.decode.loop import Runner

assert interpreter
PROMPTS = [[1, 2, 3, 4, 5], [3, 1, 4]]


def same_tokens(
    tmp_path: Path, layers: int, family: str = "llada_moe", **options: object
) -> tuple[CudaExecutor, FakeCuda]:
    """Both artifacts' tokens and forwards in float32, the GPU's through its runtime."""
    torch.set_num_threads(1)
    experts = {"moe_layer_freq": [1] * layers, "num_experts": 4} if family == "llada_moe" else {}
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", family, num_hidden_layers=layers, **experts
    )
    base = {"max_length": 24, "batch": 2, "block_length": 4, "cache": "dual"}
    given = Options(**{**base, **options})  # type: ignore[arg-type]
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
    assert gpu.interpreted > 100
    assert len({token for result in found for token in result.all_tokens}) > 2
    return executor, fake


def test_tokens_are_those_of_the_cpu(tmp_path: Path) -> None:
    """With the loop of a block inside a graph."""
    executor, fake = same_tokens(tmp_path, layers=2)
    assert executor.graph_launches
    assert any(line == "turn 1" for line in fake.log)


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"smoothing": 0.3}, {"soft_embed_logits", "soft_embed_mix"}),
        (
            {"moe_capacity": 1.0, "moe_overflow": "reroute", "expert_pool": 3},
            {"rank", "route_within", "drop", "reroute", "moe_ffn_down"},
        ),
    ],
    ids=["smoothing", "limits"],
)
def test_what_is_rarely_asked_for(
    tmp_path: Path, options: dict[str, object], kernels: set[str]
) -> None:
    executor, _ = same_tokens(tmp_path, layers=1, **options)
    names = {launch.kernel for launch in executor.plan.launches}
    assert all(any(name.startswith(one) for name in names) for one in kernels), names


def test_more_blocks_than_sequences(tmp_path: Path) -> None:
    """Pipelined, a slot has several blocks, each with a clock: the end of a turn knows all of them."""
    executor, _ = same_tokens(
        tmp_path, layers=1, family="sdar", manager="pipelined", policy="d2f", cache="block"
    )
    most = max(B for _, B in executor.memory._bindings)
    assert most > executor.plan.sizes["N"] and executor.graph_launches
