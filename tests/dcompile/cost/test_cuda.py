"""Costs of CUDA kernels beside the processor's, and occupancy against the vendor's calculator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

from dcompile.codegen.triton.tiles import ARCHITECTURES
from dcompile.cost.call import Facts
from dcompile.cost.cuda import described
from dcompile.cost.launches import chosen_experts, costs, live_candidates, routers
from dcompile.cost.occupancy import kernel_resources, occupancy, resident_blocks
from dcompile.driver.compile import compile_checkpoint
from dcompile.explain.command import explain
from dcompile.ir.work import Work
from dcompile.options import Options
from dcompile.runtime.artifact import Artifact, open_artifact

R = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """The same model for the processor and for a GPU."""
    root = tmp_path_factory.mktemp("costs")
    sizes = {"num_hidden_layers": 1, "moe_layer_freq": [1]}
    folder = write_checkpoint(root / "checkpoint", "llada_moe", dtype=torch.bfloat16, **sizes)
    given = Options(max_length=32, block_length=4)
    cpu = compile_checkpoint(folder, given, root / "cpu.dcx")
    cuda = compile_checkpoint(folder, given.changed(target="cuda:sm_90"), root / "cuda.dcx")
    return open_artifact(cpu), open_artifact(cuda)


def facts() -> Facts:
    """Two sequences: 8 rows that see 10 keys, 4 that see 7; the last 4 of each choose tokens."""
    limits, sequences = np.array([10] * 8 + [7] * 4), np.array([0] * 8 + [1] * 4)
    return Facts(R, 2, limits, sequences, np.arange(4, 12), {}, {})


def test_an_operators_launches_do_what_the_processors_one_does(
    made: tuple[Artifact, Artifact],
) -> None:
    """Products and attention: the same operations, and the same bytes of weights."""
    totals, streamed = [], []
    for artifact in made:
        plan = described(artifact)
        work = costs(plan, facts())
        heavy = [
            w
            for w, launch in zip(work, plan["launches"], strict=True)
            if w.streamed or "silu_mul" in launch["kernel"]
        ]
        totals.append(sum(w.flops for w in heavy))
        streamed.append(sum(w.streamed for w in heavy))
    routed = 4 * 8 * 8  # on the GPU one launch is the router's product and its choice
    assert totals[1] - routed == pytest.approx(totals[0], rel=1e-9)
    # Packed weights are padded.
    assert streamed[1] <= streamed[0] <= 1.5 * streamed[1]


def test_experts_and_candidates_are_looked_at(made: tuple[Artifact, Artifact]) -> None:
    plan = described(made[1])
    launches = plan["launches"]
    router = next(i for i, x in enumerate(launches) if chosen_experts(x) is not None)
    choice = [i for i, x in enumerate(launches) if live_candidates(x) is not None]
    assert len(choice) == 1
    given = replace(
        facts(),
        experts={router: np.array([[0, 3, 5]] * 8)},
        live={choice[0]: 2},
    )
    work = costs(plan, given)
    of = {x["function"]: w for x, w in zip(launches, work, strict=True)}
    looked = routers(plan)
    assert {x["function"] for x, at in zip(launches, looked, strict=True) if at == router} == {
        "moe_ffn:sort_by_expert",
        "moe_ffn:gate_up",
        "moe_ffn:down",
    }
    entry = {x["function"]: x["constants"] for x in launches}
    up, head = entry["moe_ffn:gate_up"], entry["vocab_choice:choose_partly"]
    assert of["moe_ffn:gate_up"].touched == 3
    assert of["moe_ffn:gate_up"].streamed == 3 * 2 * up["N"] * up["K"] * 2
    assert of["moe_ffn:gate_up"].flops == 4 * 8 * 3 * up["N"] * up["K"]
    assert of["vocab_choice:choose_partly"].flops == 2 * 2 * head["V"] * head["D"]
    assert of["vocab_choice:choose_partly"].streamed == head["V"] * head["D"] * 2
    attended = [w for x, w in zip(launches, work, strict=True) if x["function"] == "attend:attend"]
    heads = entry["attend:attend"]
    # The last layer's attention runs for the rows that choose tokens alone.
    assert sum(w.flops for w in attended) == 4 * (4 * 10 + 4 * 7) * heads["H"] * heads["SIZE"]
    assert all(isinstance(w, Work) and w.bytes >= w.streamed >= 0 for w in work)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "share"),
    [
        # Full, half by registers, and by shared memory, of the occupancy calculator for 8.0.
        (80, 256, 32, 0, 8, 1.0),
        (80, 256, 64, 0, 4, 0.5),
        (80, 128, 32, 48 * 1024, 3, 0.1875),
        (80, 32, 16, 0, 32, 0.5),
        # 48 warps and 16 blocks a multiprocessor.
        (86, 256, 32, 0, 6, 1.0),
        (86, 256, 64, 0, 4, 2 / 3),
        (86, 32, 16, 0, 16, 1 / 3),
        (89, 32, 16, 0, 24, 0.5),
        (89, 128, 255, 0, 2, 1 / 6),
        # 228 KiB shared, one block of the most.
        (90, 128, 168, 0, 3, 0.1875),
        (90, 128, 64, 80 * 1024, 2, 0.125),
        (90, 128, 64, 227 * 1024, 1, 0.0625),
        (100, 256, 128, 0, 2, 0.25),
        (120, 256, 40, 0, 6, 1.0),
        (120, 128, 64, 99 * 1024, 1, 4 / 48),
    ],
)
def test_occupancy(
    arch: int, threads: int, registers: int, shared: int, blocks: int, share: float
) -> None:
    warps = threads // 32
    assert resident_blocks(arch, warps, registers, shared) == blocks
    assert occupancy(arch, warps, registers, shared) == pytest.approx(share)


def test_more_than_a_chip_has_is_never_resident() -> None:
    for arch, chip in ARCHITECTURES.items():
        assert resident_blocks(arch, 4, 32, chip.shared) == 1
        assert resident_blocks(arch, 4, 32, chip.shared + 1024) == 0


def test_resources_are_shown(made: tuple[Artifact, Artifact]) -> None:
    found = kernel_resources(made[1], 90)
    table = json.loads(made[1].text("kernels.json"))["kernels"]
    assert found.keys() == table.keys()
    for name, entry in table.items():
        binary = entry["binaries"]["sm_90"]
        assert found[name]["registers"] == binary["registers"] and found[name]["spills"] == 0
        assert found[name]["occupancy"].endswith("%") and found[name]["occupancy"] != "0%"
    assert kernel_resources(made[0]) == {}
    assert "occ." in explain(Path(made[1].path))
