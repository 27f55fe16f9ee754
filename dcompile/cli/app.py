"""The application that commands register with, and what several of them take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="dcompile",
    help="Compile a diffusion language model: dcompile CHECKPOINT -o OUT.dcx. Then: dcompile run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ArtifactPath = Annotated[Path, typer.Argument(metavar="OUT.dcx", help="An artifact.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
GenLength = Annotated[int | None, typer.Option(help="Positions to generate.")]
Chat = Annotated[bool, typer.Option("--chat", help="Apply the chat template.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
SetParameter = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any parameter of the policy."),
]


@contextmanager
def telling(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Tells on stderr what is going on, to a person only."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text)
