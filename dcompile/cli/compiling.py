"""`dcompile compile`, which is also what `dcompile CHECKPOINT` means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcompile.cli.app import MAKE, Quiet, app, telling
from dcompile.cli.options import takes_options
from dcompile.options import Options

SUFFIX = ".dcx"


@app.command("compile", rich_help_panel=MAKE)
@takes_options()
def compile_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A Hugging Face folder, a model.pt, or a program exported by torch, .pt2.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The artifact to write: a .dcx file, or a folder.",
            show_default="CHECKPOINT's name with .dcx, here",
        ),
    ] = None,
    quiet: Quiet = False,
    *,
    options: Options,
) -> None:
    """Compile a checkpoint into an artifact; the word compile may be left out."""
    from dcompile.driver.compile import compile_checkpoint

    out = out or _default_out(checkpoint)
    with telling(quiet) as progress:
        compile_checkpoint(checkpoint, options, out, progress=progress)
    if not quiet:
        typer.echo(f"wrote {out}", err=True)


def _default_out(checkpoint: Path) -> Path:
    path = checkpoint.resolve()
    # The dot of `LLaDA-1.5` begins no suffix.
    return Path((path.stem if path.suffix in (".pt", ".pt2") else path.name) + SUFFIX)
