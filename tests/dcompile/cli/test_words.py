"""Which command a line means, and by which names errors call what was typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import call, fails

from dcompile import cli
from dcompile.cli.words import as_typed, command_names
from dcompile.errors import OptionError, RequestError


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "a.dcx"],
        ["run", "a.dcx", "--prompt", "a", "--prompt-ids", "1"],
        ["run", "a.dcx", "--prompt", "a", "--queue", "b.jsonl"],
        ["run", "a.dcx", "--queue", "b.jsonl", "--stream"],
        ["run", "a.dcx", "--prompt-ids", "1,x"],
        ["run", "a.dcx", "--prompt-ids", "1", "--gen-length", "many"],
        ["run", "a.dcx", "--prompt-ids", "1", "--set", "threshold"],
        ["run", "a.dcx", "--prompt-ids", "1", "--threads", "0"],
        ["run", "a.dcx", "--colour"],
        ["verify", "a.dcx"],
        ["model", "--colour"],
        ["--colour"],
        ["model", "--batch", "x"],
        [],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "near"),
    [("lst", None), ("Run", "run"), ("exlpain", "explain"), ("cmopile", "compile")],
)
def test_a_mistyped_command_is_answered_as_one(
    word: str, near: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    err = fails(capsys, 2, word, "x.dcx")
    assert f"no command and no checkpoint is named {word!r}; commands: compile, run" in err
    assert f"try    dcompile {near or 'CHECKPOINT -o OUT.dcx'}" in err


@pytest.mark.parametrize("word", ["", "a b", "\udcff", "x" * 3000, "\n", "%s{}"])
def test_any_word_is_answered(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(fails(capsys, 2, word).splitlines()) == 2


@pytest.mark.parametrize("word", ["some/folder", "model.pt", "model.pt2", "missing.dcx"])
def test_a_path_that_is_not_there_is_a_missing_checkpoint(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = fails(capsys, 1, word)
    assert word in err and "Error: " in err and "no command" not in err


def test_a_folder_that_is_there_is_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lst").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no config.json" in fails(capsys, 1, "lst")


def test_a_command_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call("run") == 2


@pytest.mark.parametrize(
    ("where", "line", "wanted"),
    [
        ("gen_length", ["run", "a.dcx", "-n", "0"], "--gen-length"),
        ("threshold", ["run", "a.dcx"], "--threshold"),
        ("threshold", ["run", "a.dcx", "--set", "threshold=2"], "--set threshold"),
        ("post_steps", ["run", "a.dcx", "--set=post-steps=2"], "--set post_steps"),
        ("weights_at", ["run", "a.dcx"], "weights_at"),
        ("block_length", ["compile", "a"], "--block-length"),
        ("block_length", ["run", "a.dcx"], "--block-length"),
        ("eos_ids", ["compile", "a"], "--eos-id"),
        ("aligned", ["compile", "a"], "--aligned"),
        ("checkpoint", ["compile", "a"], "checkpoint"),
        ("prompt 0[3]", ["run", "a.dcx"], "prompt 0[3]"),
        (None, ["run", "a.dcx"], None),
        ("gen_length", [], "gen_length"),
    ],
)
def test_an_error_names_the_option(where: str | None, line: list[str], wanted: str | None) -> None:
    typed = as_typed(RequestError("what", where=where, remedy="try"), line)
    assert (typed.what, typed.where, typed.remedy) == ("what", wanted, "try")
    assert type(as_typed(OptionError("what"), line)) is OptionError


def test_python_is_told_its_own_names(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    from dcompile.runtime.decode.loop import Runner

    with pytest.raises(RequestError) as caught:
        Runner.load(artifact).generate([[1]], gen_length=0)
    assert caught.value.where == "gen_length"
    err = fails(capsys, 1, "run", artifact, "--prompt-ids", "1", "-n", "0")
    assert "  where  --gen-length\n" in err


def test_every_command_is_known() -> None:
    assert {"compile", "run", "chat", "info"} <= set(command_names())
    assert len(command_names()) == len(cli.app.registered_commands)


def test_what_the_file_system_refuses_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    err = fails(capsys, 1, "verify", "a.dcx", "/" + "x" * 3000)
    assert "Error: " in err and len(err) < 1000
