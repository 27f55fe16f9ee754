"""Makes `toy`, the model of these tests, importable, and builds its code once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import toy


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return toy.build(tmp_path_factory.mktemp("toy"))
