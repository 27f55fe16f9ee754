"""`dcompile export`: which format, from what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dcompile.errors import OptionError
from dcompile.export.containers import is_artifact, repack

CONTAINERS = ("folder", "dcx")
FORMATS = CONTAINERS


@dataclass(frozen=True)
class Asked:
    """What the command line wants."""

    source: Path
    out: Path
    format: str
    progress: Callable[[str], None]


def export(asked: Asked) -> Path:
    """Write `asked.out`; raises DcompileError, and then leaves nothing half-made."""
    if asked.format not in FORMATS:
        raise OptionError(
            f"there is no export format {asked.format!r}", remedy=f"one of {', '.join(FORMATS)}"
        )
    if not is_artifact(asked.source):
        raise OptionError(
            f"{asked.source} is a checkpoint; a {asked.format} is made of an artifact",
            remedy=f"compile it: dcompile {asked.source} -o {asked.out}",
        )
    asked.progress("copy")
    return repack(asked.source, asked.out, asked.format)
