"""Commands that make something else of a model: `export`, `tune`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcompile.cli.app import MAKE, Quiet, app, telling
from dcompile.cli.options import takes_options
from dcompile.options import Options


@app.command("export", rich_help_panel=MAKE)
@takes_options(
    "dtype", "max_length", "block_length", "policy", "score", "cache", "mask_id", "eos_ids"
)
def export_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An artifact, or a checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to write.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="onnx|pt2|folder|dcx",
            help="What to write: the step as an ONNX "
            "model or a torch program, or an artifact as a folder or as one file.",
        ),
    ],
    entry: Annotated[
        str,
        typer.Option(
            metavar="window|full",
            help="What a call of the step computes: window, some positions, with keys and values "
            "handed in and out; full, all positions.",
        ),
    ] = "window",
    quiet: Quiet = False,
    *,
    options: Options,
) -> None:
    """Take a model out: its denoising step as ONNX or .pt2, an artifact as a folder or one file.

    Options of the compiler, from --dtype on, are for checkpoints; an artifact has its own.
    """
    from dcompile.export.command import Asked, export

    options.validate()
    with telling(quiet) as progress:
        made = export(Asked(model, out, format, progress, entry, options))
    if not quiet:
        for note in made.notes:
            typer.echo(note, err=True)
        typer.echo(f"wrote {', '.join(map(str, made.files))}", err=True)


@app.command(rich_help_panel=MAKE)
def tune(
    path: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="The artifact or checkpoint whose kernels to tune."),
    ],
    families: Annotated[
        str,
        typer.Option(
            metavar="linear,attend", help="Kernels to tune, by kind.", show_default="all kinds"
        ),
    ] = "",
    rows: Annotated[
        int, typer.Option(min=1, help="Rows that an iteration computes: sequences times block.")
    ] = 32,
    most: Annotated[
        int, typer.Option(min=1, help="Most choices of tiles to time for a kernel's shape.")
    ] = 32,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE.json",
            help="Where to keep what was found.",
            show_default="the compiler's own table",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Time the tiles of a model's CUDA kernels on this GPU; later compiles use the fastest."""
    from rich.console import Console

    from dcompile.tuning.command import shown, tune_path

    chosen = [name.strip() for name in families.split(",") if name.strip()]
    with telling(quiet) as progress:
        progress("looking for a GPU")
        found = tune_path(path, families=chosen, rows=rows, most=most, out=out, progress=progress)
    Console(width=120).print(shown(found))


@app.command(rich_help_panel=MAKE)
def demo() -> None:
    """Compile and run the small trained model that ships with the package."""
    from dcompile.demo import run_demo

    run_demo()
