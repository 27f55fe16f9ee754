"""One small MoE model, compiled and profiled once for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options
from dcompile.profile import Capture, profile_artifact
from dcompile.profile.summary import Profile, summarize

PROMPTS = [[3, 14, 15, 92, 65], [35, 8, 97, 93, 23, 84, 62, 64, 33, 83, 27]]


@pytest.fixture(scope="package")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    checkpoint = write_checkpoint(folder / "checkpoint", "llada_moe")
    options = Options(max_length=64, batch=2, block_length=8, cache="dual")
    return compile_checkpoint(checkpoint, options, folder / "model.dcx")


@pytest.fixture(scope="package")
def captured(artifact: Path) -> Capture:
    return profile_artifact(artifact, PROMPTS, 16, {"threshold": 0.5}, rounds=3, threads=1)


@pytest.fixture(scope="package")
def profile(captured: Capture) -> Profile:
    return summarize(captured)
