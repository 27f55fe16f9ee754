"""The command line: `dcompile CHECKPOINT` compiles, the subcommands do the rest.

Each command imports what it needs when it runs: `--help` loads no torch, `run` no compiler.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

# Imported because they register their commands, in the order in which help lists them.
from dcompile.cli import compiling, generating, looking, making  # noqa: F401
from dcompile.cli.app import app
from dcompile.cli.words import as_typed, with_command
from dcompile.errors import DcompileError, naming_missing

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a named error, 2 wrong usage, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A named interrupt lets half-made files be removed; by default a process just ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given = with_command(given)
    _open_streams()
    try:
        with naming_missing(f"dcompile {given[0]}" if given else "dcompile"):
            app(given, prog_name="dcompile")
    except DcompileError as error:
        typer.echo(f"{type(error).__name__}: {as_typed(error, given)}", err=True)
        sys.exit(1)
    except OSError as error:
        # What the file system refuses anywhere: a name that is too long, a full disk.
        where = "" if error.filename is None else f"\n  where  {error.filename!r:.200}"
        typer.echo(f"OSError: {error.strerror or error}{where}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError:
        typer.echo("MemoryError: this machine has too little memory for that", err=True)
        sys.exit(1)


def _open_streams() -> None:
    """Stand-ins for streams that the caller has closed: what is told is dropped, results are not."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    if sys.stdout is None:
        sys.stdout = _Closed()


class _Closed(io.TextIOBase):
    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "the standard output, which the result goes to, is closed")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"dcompile {version('dcompile')}")
        raise typer.Exit


@app.callback(options_metavar="CHECKPOINT -o OUT.dcx", subcommand_metavar="| COMMAND ...")
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
