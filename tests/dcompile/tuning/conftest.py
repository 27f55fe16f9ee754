"""A fake GPU, sm_90."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fake_cuda
import pytest
from fake_cuda import FakeCuda


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.build(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def fake(built: Path, tmp_path: Path) -> Iterator[FakeCuda]:
    out = fake_cuda.load(built, tmp_path)
    yield out
    for error in out.errors:
        raise error
