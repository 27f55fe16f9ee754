"""Help: of every command and every one of its options, with what happens where one is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import typer
from commands import call

from dcompile.cli import app
from dcompile.cli.options import PANELS
from dcompile.options import Options

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
DEFAULTLESS = {  # left out, they are not there: nothing stands in their place
    "run": {"prompt", "prompt_ids", "prompts", "queue"},
    "chat": {"system"},
    "explain": {"kind", "graph", "times"},
    "profile": {"prompt", "prompt_ids", "prompts", "trace", "html", "compare"},
    "bench": {"checkpoint"},
}


def parameters() -> Iterator[tuple[str, Any]]:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            yield name, parameter


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str) -> None:
    assert COMMANDS[name].help


@pytest.mark.parametrize(
    ("name", "parameter"), [pytest.param(n, p, id=f"{n}-{p.name}") for n, p in parameters()]
)
def test_every_option_has_help_and_shows_its_default(name: str, parameter: Any) -> None:
    assert parameter.help and parameter.help.endswith(".")
    given = parameter.default
    # A switch that is off says so by being one.
    if parameter.required or (given is False and not parameter.secondary_opts):
        return
    if parameter.name in DEFAULTLESS.get(name, ()):
        assert given is None and not isinstance(parameter.show_default, str)
    elif given in (None, "", (), []):
        assert isinstance(parameter.show_default, str), "say what happens where it is left out"
    else:
        assert parameter.show_default


def test_a_default_that_is_said_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compile", "--help") == 0
    out = capsys.readouterr().out
    assert "CHECKPOINT's name" in out and "[default: 16]" in out


def test_options_of_the_compiler_are_in_panels() -> None:
    panels = [p.rich_help_panel for p in COMMANDS["compile"].params if p.rich_help_panel]
    assert list(dict.fromkeys(panels)) == list(PANELS)
    assert len(panels) == len(fields(Options))


@pytest.mark.parametrize(("name", "flag"), [("run", "-p"), ("run", "-n"), ("chat", "-n")])
def test_short_names(name: str, flag: str) -> None:
    assert any(flag in parameter.opts for parameter in COMMANDS[name].params)


def test_the_first_thing_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert "Usage: dcompile CHECKPOINT -o OUT.dcx" in out
    assert sum(line.strip().startswith("dcompile ") for line in out.splitlines()) == 3
    assert all(name in out for name in COMMANDS)
    assert call("-h") == 0
    assert capsys.readouterr().out == out


def test_commands_are_listed_as_they_are_met() -> None:
    first = ["compile", "run", "chat", "calibrate", "info", "explain"]
    assert list(COMMANDS)[: len(first)] == first


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("dcompile ")
