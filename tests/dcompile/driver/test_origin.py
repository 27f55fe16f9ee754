"""What is said of a checkpoint as it is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from dcompile.driver.compile import compile_checkpoint
from dcompile.driver.origin import open_origin
from dcompile.explain.command import remarks
from dcompile.options import Options


def test_a_key_that_nobody_reads_is_said_once_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path / "c", "sdar", attention_chunk_size=8, odd_scale=2.0)
    made = compile_checkpoint(folder, Options(max_length=64), tmp_path / "model.dcx")
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 1
    assert str(folder) in said[0] and "attention_chunk_size, odd_scale" in said[0]
    for key in ("attention_chunk_size", "odd_scale"):
        assert f"{key}: missed open: this key of the config is not known\n" in remarks(made, "all")


def test_nothing_is_said_of_known_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    origin = open_origin(write_checkpoint(tmp_path, "llada2"), Options())
    assert origin.remarks == () and not caplog.records
