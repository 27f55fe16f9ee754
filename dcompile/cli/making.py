"""Commands that make something of a model: `compile`, `export`, `tune`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcompile.cli.app import Quiet, app, telling
from dcompile.cli.options import takes_options
from dcompile.options import Options

SUFFIX = ".dcx"


@app.command("compile")
@takes_options()
def compile_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, a model.pt or an exported .pt2.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A .dcx file, or a folder.")
    ] = None,
    quiet: Quiet = False,
    *,
    options: Options,
) -> None:
    """Compile a checkpoint (also without the word: `dcompile CHECKPOINT`)."""
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


@app.command("export")
@takes_options(
    "dtype", "max_length", "block_length", "policy", "score", "cache", "mask_id", "eos_ids"
)
def export_command(
    model: Annotated[Path, typer.Argument(help="An artifact, or a checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file or folder to write.")],
    format: Annotated[str, typer.Option(help="onnx, pt2, folder or dcx.")],
    entry: Annotated[
        str, typer.Option(help="window: some positions, keys and values in and out. full: all.")
    ] = "window",
    quiet: Quiet = False,
    *,
    options: Options,
) -> None:
    """Take a model out: its denoising step as ONNX or .pt2, an artifact as a folder or one file.

    Options of the compiler, from --max-length on, are for checkpoints; an artifact has its own.
    """
    from dcompile.export.command import Asked, export

    options.validate()
    with telling(quiet) as progress:
        made = export(Asked(model, out, format, progress, entry, options))
    if not quiet:
        for note in made.notes:
            typer.echo(note, err=True)
        typer.echo(f"wrote {', '.join(map(str, made.files))}", err=True)


@app.command()
def tune(
    path: Annotated[
        Path, typer.Argument(metavar="ARTIFACT|CHECKPOINT", help="Whose kernels to tune.")
    ],
    families: Annotated[
        str, typer.Option(metavar="linear,attend", help="Only these; default all.")
    ] = "",
    rows: Annotated[int, typer.Option(min=1, help="Rows of an iteration.")] = 32,
    most: Annotated[int, typer.Option(min=1, help="Choices of tiles a shape.")] = 32,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Default: the compiler's own table.")
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


@app.command()
def demo() -> None:
    """Compile and run the small trained model that ships with the package."""
    from dcompile.demo import run_demo

    run_demo()
