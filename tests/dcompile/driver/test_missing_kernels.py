"""An artifact on another GPU than it was compiled for, with Triton at hand."""

from __future__ import annotations

from pathlib import Path

import fake_cuda
import pytest
import torch
from checkpoints import write_checkpoint

from dcompile.driver import missing_kernels as on_the_spot
from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import WrongArchitecture
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.cuda.code import hooks
from dcompile.runtime.cuda.executor import CudaExecutor


def test_it_is_compiled_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "c", "llada", dtype=torch.bfloat16, n_layers=1)
    options = Options(target="cuda:sm_90", max_length=64, block_length=8)
    artifact = open_artifact(compile_checkpoint(folder, options, tmp_path / "a.dcx"))
    built = fake_cuda.build(tmp_path)
    fake = fake_cuda.load(built, tmp_path, arch=89)
    monkeypatch.setattr(hooks, "compile", None)
    with pytest.raises(WrongArchitecture, match="kernels for sm_90; this GPU is sm_89"):
        CudaExecutor(artifact, fake.device())
    on_the_spot.install()
    # The fake driver refuses a binary of another architecture, as a driver does.
    executor = CudaExecutor(artifact, fake.device())
    assert {k.entry.file.split("/")[1] for k in executor.kernels.values()} == {"sm_89"}
    assert executor.loops
    hooks.compile = None
