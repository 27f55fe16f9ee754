"""What is said of a checkpoint as it is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from dcompile.driver.compile import compile_checkpoint
from dcompile.driver.origin import open_origin
from dcompile.errors import OptionError
from dcompile.explain.command import remarks
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact


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


def test_the_user_s_block_length_is_the_mask_s(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, options = (
        write_checkpoint(tmp_path / "c", "sdar"),
        Options(block_length=8, max_length=64),
    )
    made = compile_checkpoint(folder, options, tmp_path / "model.dcx")
    assert open_artifact(made).manifest["model"]["block_length"] == 8
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 1 and "8 positions asked for, not 4" in said[0]
    stated = write_checkpoint(tmp_path / "d", "sdar", block_size=4)
    with pytest.raises(OptionError) as error:
        compile_checkpoint(stated, options, tmp_path / "other.dcx")
    assert "--block-length 4" in str(error.value)


def test_nothing_is_said_of_known_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    origin = open_origin(write_checkpoint(tmp_path, "llada2"), Options())
    assert origin.remarks == () and not caplog.records
