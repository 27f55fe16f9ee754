"""These tests need a process in which Triton interprets; `../test_kernels.py` starts one."""

from __future__ import annotations

import os
import zlib

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def replayable(request: pytest.FixtureRequest) -> None:
    """Each test draws from its own stream, so that a failure happens again."""
    import torch

    torch.manual_seed(zlib.crc32(request.node.name.encode()))
