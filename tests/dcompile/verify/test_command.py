"""`verify` finds a wrong pass, one altered weight, a wrong rotary table, a transposed expert, another plan."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from quick import compile_quickly

from dcompile.driver import pipeline
from dcompile.driver.compile import compile_checkpoint
from dcompile.driver.pipeline import name_of
from dcompile.errors import ArtifactError, VerificationError
from dcompile.ir import operators
from dcompile.ir.program import Exactness, Pass, Program
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.tensors import array_of, tensor_of
from dcompile.runtime.writing import write_artifact
from dcompile.verify.command import (
    Compiled,
    compare_layers,
    compare_plan,
    compare_tensors,
    compile_again,
    verify,
)

aten = torch.ops.aten


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("verify")
    folder = write_checkpoint(root / "checkpoint", "llada_moe")
    options = Options(max_length=64, block_length=8, cache="dual")
    return folder, compile_checkpoint(folder, options, root / "model.dcx")


@pytest.fixture(scope="module")
def again(made: tuple[Path, Path]) -> Compiled:
    folder, artifact = made
    return compile_again(folder, open_artifact(artifact).manifest["options"])


def altered(
    path: Path,
    out: Path,
    name_part: str,
    change: Callable[[torch.Tensor], None],
    change_plan: Callable[[dict[str, Any]], None] = lambda plan: None,
) -> str:
    """A well-formed artifact, hashes and all, with one tensor changed, or the plan; the tensor's name."""
    artifact = open_artifact(path)
    plan = copy.deepcopy(dict(artifact.plan.text))
    change_plan(plan)
    names = sorted({b.tensor for b in artifact.plan.buffers if b.kind == "weight"})
    chosen = next(n for n in names if name_part in n)
    tensors = []
    for name in names:
        tensor = tensor_of(artifact.weights(name)).clone()
        if name == chosen:
            change(tensor)
        tensors.append((name, array_of(tensor)))
    files = {
        n: bytes(artifact.bytes(n))
        for n in artifact.names
        if not n.startswith("weights/") and n not in ("plan.json", "manifest.json")
    }
    manifest = {
        k: v for k, v in artifact.manifest.items() if k not in ("files", "sha256", "format")
    }
    write_artifact(out, manifest, plan, tensors, files)
    return chosen


def one_value(tensor: torch.Tensor) -> None:
    tensor.view(-1)[7] += 1e-3


def shift_table(tensor: torch.Tensor) -> None:
    tensor.copy_(tensor.roll(1, 0))


def transpose_expert(tensor: torch.Tensor) -> None:
    half = tensor.numel() // 8
    square = tensor[: half // 64 * 64].view(-1, 64)
    size = min(square.shape[0], 64)
    square[:size, :size] = square[:size, :size].T.clone()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("q_k_v", one_value),
        ("lm_head", one_value),
        ("embed", one_value),
        ("const_", shift_table),
        ("experts_gate_proj_gate_up", transpose_expert),
        ("experts_down", transpose_expert),
    ],
)
def test_finds_what_was_altered(
    made: tuple[Path, Path],
    again: Compiled,
    tmp_path: Path,
    part: str,
    change: Callable[[torch.Tensor], None],
) -> None:
    name = altered(made[1], tmp_path / "bad.dcx", part, change)
    with pytest.raises(VerificationError, match=name) as found:
        compare_tensors(open_artifact(tmp_path / "bad.dcx"), again)
    if "layers_" in name:
        assert f"of layer {re.search('layers_([0-9]+)', name)[1]}" in str(found.value)  # type: ignore[index]


def test_says_what_it_compared(made: tuple[Path, Path]) -> None:
    report = verify(made[1], made[0])
    assert "11 stages: within" in report and "values: equal" in report
    assert "28 launches, each within" in report


@dataclass(frozen=True)
class Scales:
    """A pass that is wrong: attention's scale times `by`."""

    by: float
    exactness: Exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        sites = list(program.calls(operators.ATTEND))
        for node in sites[-1:]:
            node.args = (*node.args[:-1], node.args[-1] * self.by)
        return len(sites)


@dataclass(frozen=True)
class SwapsRows:
    """A pass that is right only where the rows are all of a sequence in order."""

    exactness: Exactness = Exactness.EXACT

    def __call__(self, program: Program) -> int:
        row_seq, row_pos = program.placeholder("row_seq"), program.placeholder("row_pos")
        canvas = program.placeholder("canvas")
        sites = [
            n for n in program.calls(aten.index.Tensor) if n.args == (canvas, [row_seq, row_pos])
        ]
        for site in sites:
            made = []
            with program.graph.inserting_before(site):
                made.append(program.graph.call_function(aten.ones_like.default, (row_seq,)))
                made.append(program.graph.call_function(aten.cumsum.default, (made[0], 0)))
                made.append(program.graph.call_function(aten.sub.Scalar, (made[1], 1)))
            for node in made:
                node.meta = dict(row_seq.meta)
            site.args = (canvas, [row_seq, made[-1]])
        return len(sites)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Scales(1.1), "after scales the confidences depart"),
        (Scales(1.0000002, Exactness.EXACT), "scales is exact, but changed"),
        (SwapsRows(), r"after swaps_rows \(rows of the block only\)"),
    ],
)
def test_names_the_pass_that_departs(
    wrong: Pass, words: str, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pipeline.passes

    def passes(options: Options) -> tuple[Pass, ...]:
        order = list(right(options))
        order.insert([name_of(p) for p in order].index("reuse_kv") + 1, wrong)
        return tuple(order)

    monkeypatch.setattr(pipeline, "passes", passes)
    with pytest.raises(VerificationError, match=words):
        verify(made[1], made[0])


def test_names_the_layer_that_departs(
    made: tuple[Path, Path], again: Compiled, tmp_path: Path
) -> None:
    """Were the stored values not compared, running them would still find it."""

    def much(tensor: torch.Tensor) -> None:
        tensor *= 1.01

    assert "launches, each within" in compare_layers(Runner.load(made[1]), again)
    for layer in (0, 1):
        path = tmp_path / f"{layer}.dcx"
        altered(made[1], path, f"layers_{layer}_post_attention", much)
        with pytest.raises(VerificationError, match=f"layer {layer} departs"):
            compare_layers(Runner.load(path), again)


def change_launch(plan: dict[str, Any]) -> None:
    launch = next(item for item in plan["launches"] if item["kernel"].startswith("attend"))
    launch["args"][-1]["f"] *= 2


def test_names_the_launch_that_is_another(
    made: tuple[Path, Path], again: Compiled, tmp_path: Path
) -> None:
    compare_plan(open_artifact(made[1]), again)
    altered(made[1], tmp_path / "bad.dcx", "", lambda tensor: None, change_launch)
    with pytest.raises(VerificationError, match=r"launches something else[^!]*layer 0"):
        compare_plan(open_artifact(tmp_path / "bad.dcx"), again)


def test_another_checkpoint_is_not_this_one(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "llada_moe", seed=1)
    with pytest.raises(VerificationError):
        verify(made[1], other, run_model=False)


def test_a_flipped_byte_is_found_at_load(made: tuple[Path, Path], tmp_path: Path) -> None:
    data = bytearray(made[1].read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.dcx").write_bytes(data)
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "bad.dcx")


def test_smoothing_in_a_pipeline_is_verified(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "sdar")
    options = Options(max_length=64, manager="pipelined", policy="d2f", smoothing=0.3)
    artifact = compile_quickly(folder, options, tmp_path / "model.dcx")
    assert "each within" in verify(artifact, folder)
