"""AMX is among a processor's flags only where the kernel grants its tiles."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dcompile.runtime import processor


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nflags : fpu avx2 amx_tile amx_bf16 amx_int8\nflags : other\n")
    monkeypatch.setattr(processor, "_CPUINFO", path)
    return path


def test_tiles_that_are_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_granted", lambda: True)
    assert processor.cpu_flags() == {"fpu", "avx2", "amx_tile", "amx_bf16", "amx_int8"}


def test_tiles_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processor, "_granted", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert processor.cpu_flags() == {"fpu", "avx2"}
    assert "refuses its tiles" in caplog.text


def test_a_processor_without_tiles_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, listed: Path
) -> None:
    monkeypatch.setattr(processor, "_granted", lambda: pytest.fail("asked"))
    listed.write_text("Features : fp asimd\n")
    assert processor.cpu_flags() == {"fp", "asimd"}
    listed.unlink()
    assert processor.cpu_flags() == frozenset()
