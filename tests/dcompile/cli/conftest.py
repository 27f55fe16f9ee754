"""Toy artifacts, and signals as they were."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "runtime"))

import test_tokens
import toy
from toy import Toy


@pytest.fixture(autouse=True)
def keep_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return toy.build(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def artifact(tmp_path: Path, code: bytes) -> str:
    return str(toy.write(tmp_path / "toy.dcx", Toy(batch=2), code))


@pytest.fixture
def talking(tmp_path: Path, code: bytes) -> str:
    files = {"tokenizer/tokenizer.json": test_tokens.tokenizer_json()}
    return str(toy.write(tmp_path / "talking.dcx", Toy(), code, **files))
