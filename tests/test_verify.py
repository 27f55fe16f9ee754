"""`verify` finds one altered weight, a wrong rotary table, a transposed expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from dcompile.driver import compile_checkpoint
from dcompile.errors import ArtifactError, VerificationError
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.writing import write_artifact
from dcompile.verify import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("verify")
    folder = write_checkpoint(root / "checkpoint", "llada_moe")
    options = Options(max_length=64, block_length=8, cache="dual")
    return folder, compile_checkpoint(folder, options, root / "model.dcx")


def altered(path: Path, out: Path, name_part: str, change: Callable[[torch.Tensor], None]) -> str:
    """A well-formed artifact, hashes and all, with one tensor changed; the tensor's name."""
    artifact = open_artifact(path)
    plan = dict(artifact.plan.text)
    names = sorted({b.tensor for b in artifact.plan.buffers if b.kind == "weight"})
    chosen = next(n for n in names if name_part in n)
    tensors = []
    for name in names:
        tensor = artifact.weights(name).clone()
        if name == chosen:
            change(tensor)
        tensors.append((name, tensor))
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
        ("experts_gate_proj_up", transpose_expert),
        ("experts_down", transpose_expert),
    ],
)
def test_finds_what_was_altered(
    made: tuple[Path, Path], tmp_path: Path, part: str, change: Callable[[torch.Tensor], None]
) -> None:
    folder, artifact = made
    name = altered(artifact, tmp_path / "bad.dcx", part, change)
    with pytest.raises(VerificationError, match=name):
        verify(tmp_path / "bad.dcx", folder)


def test_another_checkpoint_is_not_this_one(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "llada_moe", seed=1)
    with pytest.raises(VerificationError):
        verify(made[1], other)


def test_a_flipped_byte_is_found_at_load(made: tuple[Path, Path], tmp_path: Path) -> None:
    data = bytearray(made[1].read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.dcx").write_bytes(data)
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "bad.dcx")
