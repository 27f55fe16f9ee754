"""Large pages: what is given out, and what is told of a mapped file."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from dcompile.runtime import pages


@pytest.mark.parametrize("size", [0, 1, 4096, 524287, 524288, 3 << 20])
def test_zeros_are_zero_and_writable(size: int) -> None:
    held = pages.zeros(size)
    assert len(held) == size
    assert not held.any()
    held[:] = 7
    if size >= 524288:
        assert held.ctypes.data % pages.LARGE == 0


def test_more_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        pages.zeros(1 << 60)


def test_the_share_is_of_the_file_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "weights of a model"
    path.write_bytes(bytes(3 << 20))
    assert pages.share_in_large(path) is None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        pages.ask_for_large(held)
        assert held[5] == 0
        share = pages.share_in_large(path)
        assert share is not None
        assert 0 <= share <= 1
        assert pages.share_in_large(tmp_path) == share
        assert pages.share_in_large(tmp_path / "weights") is None
