"""`dcompile CHECKPOINT`: the checkpoint, where the artifact goes, and every option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import call, fails

from dcompile.driver import compile as driver
from dcompile.errors import CheckpointError, OutputError
from dcompile.options import Options


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def compile_checkpoint(path: Path, options: Options, out: Path, progress: Any) -> Path:
        progress("trace")
        calls.append((path, options, out))
        return out

    monkeypatch.setattr(driver, "compile_checkpoint", compile_checkpoint)
    return calls


def test_a_checkpoint_needs_no_subcommand(
    compiled: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("some/model.pt") == 0
    assert call("compile", "some/model.pt") == 0
    assert call("-o", "there.dcx", "some/folder/") == 0
    out, err = capsys.readouterr()
    assert out == "" and err == "wrote model.dcx\nwrote model.dcx\nwrote there.dcx\n"
    assert compiled[0] == compiled[1] == (Path("some/model.pt"), Options(), Path("model.dcx"))
    assert compiled[2] == (Path("some/folder"), Options(), Path("there.dcx"))


def test_a_folder_may_have_a_dot(compiled: list[Any], tmp_path: Path) -> None:
    (tmp_path / "LLaDA-1.5").mkdir()
    assert call(str(tmp_path / "LLaDA-1.5"), "-q") == 0
    assert compiled[0][2] == Path("LLaDA-1.5.dcx")


def test_every_option_arrives(compiled: list[Any]) -> None:
    flags = (
        "--target cpu --dtype bfloat16 --max-length 512 --batch 2 --block-length 32 "
        "--policy threshold --cache vicinity --look-back 3 --look-ahead 4 --warmup 5 "
        "--refresh-every 6 --no-cross-block --smoothing 0.3 --mask-id 7 --eos-id 8 --eos-id 9 --check "
        "--stop-after fuse_moe --skip a --skip b --threads 3"
    )
    assert call("a/model", *flags.split(), "--quiet") == 0
    wanted = Options(
        target="cpu",
        dtype="bfloat16",
        max_length=512,
        batch=2,
        block_length=32,
        policy="threshold",
        cache="vicinity",
        look_back=3,
        look_ahead=4,
        warmup=5,
        cross_block=False,
        refresh_every=6,
        smoothing=0.3,
        mask_id=7,
        eos_ids=(8, 9),
        check=True,
        stop_after="fuse_moe",
        skip=("a", "b"),
        threads=3,
    )
    assert compiled[0][1] == wanted


@pytest.mark.parametrize("error", [CheckpointError("x", remedy="y"), OutputError("full")])
def test_an_error_of_the_compiler(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(driver, "compile_checkpoint", fail)
    err = fails(capsys, 1, "a/model")
    assert err == f"{type(error).__name__}: {error}\n"
