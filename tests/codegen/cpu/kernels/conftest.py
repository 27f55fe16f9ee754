"""The library of kernels: for every instruction set that this machine runs, and the best."""

from __future__ import annotations

import zlib

import pytest
import torch
from native import Library

from dcompile.codegen.cpu import build
from dcompile.runtime.processor import cpu_flags

# sse4a says where avx512bf16 is worth taking, not where it runs.
ISAS = build.runnable([*cpu_flags(), "sse4a"])


@pytest.fixture(scope="session", params=ISAS)
def lib(request: pytest.FixtureRequest) -> Library:
    return Library(build.build_library([request.param])[request.param])


@pytest.fixture(scope="session")
def best() -> Library:
    return Library(build.build_library([ISAS[0]])[ISAS[0]])


@pytest.fixture(autouse=True)
def replayable(request: pytest.FixtureRequest) -> None:
    """Each test draws from its own stream, so that a failure happens again."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
