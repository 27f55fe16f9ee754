"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from dcompile.errors import OutputError


def check_target(out: Path) -> None:
    """Raise OutputError where no file can be written at `out`."""
    if not out.name or not out.parent.is_dir():
        raise OutputError("there is no folder to write to", where=str(out.parent))
    if out.exists() and not out.is_file():
        raise OutputError("the output exists and is no file", where=str(out))
    if not os.access(out.parent, os.W_OK):
        raise OutputError("the folder cannot be written to", where=str(out.parent))


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` whose files move there at the end, the one called `out` last."""
    folder = out.parent / f".{out.name}.{os.getpid()}-{uuid4().hex}.tmp"
    try:
        folder.mkdir()
        yield folder
        # A model must not read another one's weights, so an old one goes before they come.
        if any(path.name == f"{out.name}.data" for path in folder.iterdir()):
            out.unlink(missing_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == out.name):
            os.replace(path, out.parent / path.name)
    except OSError as error:
        what = f"the model could not be written: {error.strerror or error}"
        remedy = "free some space there, or write to another place"
        raise OutputError(what, where=str(out), remedy=remedy) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
