"""Toy artifacts, and signals as they were."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy
from toy import Toy
from words import tokenizer_json


@pytest.fixture(autouse=True)
def keep_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def artifact(tmp_path: Path, code: bytes) -> str:
    return str(toy.write(tmp_path / "toy.dcx", Toy(batch=2), code))


@pytest.fixture
def talking(tmp_path: Path, code: bytes) -> str:
    files = {"tokenizer/tokenizer.json": tokenizer_json()}
    return str(toy.write(tmp_path / "talking.dcx", Toy(), code, **files))
