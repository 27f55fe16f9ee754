"""The words of a command line: which command the first one means, which option an error is about."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from dcompile.cli.app import app
from dcompile.errors import DcompileError

_GLOBAL = ("--help", "-h", "--version")
_CHECKPOINTS = (".pt", ".pt2", ".dcx", ".safetensors")


def with_command(arguments: Sequence[str]) -> list[str]:
    """`dcompile CHECKPOINT ...` means `dcompile compile CHECKPOINT ...`.

    Exits with 2 where the first word is neither a command nor could be a checkpoint.
    """
    if not arguments or arguments[0] in (*_GLOBAL, *(names := command_names())):
        return list(arguments)
    first = arguments[0]
    if not (first.startswith("-") or _may_be_a_checkpoint(first)):
        typer.echo(_unknown(first, names), err=True)
        sys.exit(2)
    return ["compile", *arguments]


def command_names() -> list[str]:
    return [c.name or c.callback.__name__ for c in app.registered_commands]  # type: ignore[union-attr]


def _may_be_a_checkpoint(word: str) -> bool:
    """Whether it is there, or looks like a path: then what is missing is the checkpoint."""
    looks = os.sep in word or Path(word).suffix in _CHECKPOINTS
    return looks or os.path.exists(word)


def _unknown(word: str, names: Sequence[str]) -> str:
    near = get_close_matches(word.lower(), names)
    hints = [f"dcompile {name}" for name in near] or ["dcompile CHECKPOINT -o OUT.dcx"]
    return (
        f"no command and no checkpoint is named {word!r:.80}; commands: {', '.join(names)}\n"
        f"  try    {', or '.join(hints)}"
    )


def as_typed(error: DcompileError, arguments: Sequence[str]) -> DcompileError:
    """The error as the command line says it: a Python argument's name as the option that gives it."""
    command = arguments[0] if arguments else ""
    where = _spellings(command, arguments).get(error.where or "", error.where)
    return type(error)(error.what, where=where, remedy=error.remedy)


def _spellings(command: str, arguments: Sequence[str]) -> dict[str, str]:
    """Options by the names that they have in Python: the compiler's, the command's, those of --set."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    spelled: dict[str, str] = {}
    for name in dict.fromkeys(("compile", command)):
        for parameter in commands[name].params if name in commands else ():
            flags = [flag for flag in parameter.opts if flag.startswith("--")]
            spelled |= {parameter.name: flags[0]} if flags else {}
    return spelled | {name: f"--set {name}" for name in _set_names(arguments)}


def _set_names(arguments: Sequence[str]) -> Iterator[str]:
    joined = (word.removeprefix("--set=") for word in arguments if word.startswith("--set="))
    apart = (after for word, after in pairwise(arguments) if word == "--set")
    for assignment in (*joined, *apart):
        yield assignment.partition("=")[0].strip().replace("-", "_")
