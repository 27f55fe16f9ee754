"""Toys that tests of several folders run: a CPU model's code, and a fake GPU; each built once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import fake_cuda
import gpu_toy
import pytest
import toy
from fake_cuda import FakeCuda
from toy import Toy


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return toy.build(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.build(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def fake(built: Path, tmp_path: Path) -> Iterator[FakeCuda]:
    """A fake GPU, sm_90; what its kernels raised is raised at the end."""
    out = fake_cuda.load(built, tmp_path)
    yield out
    for error in out.errors:
        raise error


@pytest.fixture(scope="session")
def toy_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy_gpu")
    toy.build(folder)
    return folder / "toy.so"


@pytest.fixture
def on_gpu(fake: FakeCuda, toy_library: Path) -> Callable[[Toy], FakeCuda]:
    """The fake GPU with the toy's kernels of a case."""

    def prepare(case: Toy) -> FakeCuda:
        fake.kernels = gpu_toy.Kernels(case, toy_library)
        return fake

    return prepare
