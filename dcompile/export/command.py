"""`dcompile export`: which format, from what."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dcompile.errors import BuildError, OptionError
from dcompile.export.containers import is_artifact, repack
from dcompile.options import Options

CONTAINERS = ("folder", "dcx")
FORMATS = ("onnx", "pt2", *CONTAINERS)
ENTRIES = ("window", "full")
_NEEDS = {"onnx": ("onnx", "onnxscript")}


@dataclass(frozen=True)
class Asked:
    """What the command line wants; `options` are for a checkpoint, which is planned first."""

    source: Path
    out: Path
    format: str
    progress: Callable[[str], None] = lambda _: None
    entry: str = "window"
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Exported:
    """The files that were written, and what the user should know of them."""

    files: list[Path]
    notes: list[str]


def export(asked: Asked) -> Exported:
    """Write `asked.out`; raises DcompileError, and then leaves nothing half-made."""
    _check(asked)
    if asked.format in CONTAINERS:
        asked.progress("copy")
        return Exported([repack(asked.source, asked.out, asked.format)], [])
    from dcompile.export.source import open_source

    wanted = asked.options.dtype
    options = asked.options
    if not is_artifact(asked.source) and wanted == "float32":
        # As stored, and widened below: an artifact that was compiled as stored gives the same.
        options = replace(options, dtype="auto")
    source = open_source(asked.source, options, asked.progress)
    dtype, notes = _dtype(source.dtype, wanted, asked.format)
    asked.progress(asked.format)
    if asked.format == "pt2":
        from dcompile.export.pt2 import write_pt2

        return Exported(write_pt2(source, asked.out, asked.entry, dtype), notes)  # type: ignore[arg-type]
    from dcompile.export.onnx_file import write_onnx

    return Exported(write_onnx(source, asked.out, asked.entry, dtype), notes)  # type: ignore[arg-type]


def _check(asked: Asked) -> None:
    if asked.format not in FORMATS:
        raise OptionError(
            f"there is no export format {asked.format!r}", remedy=f"one of {', '.join(FORMATS)}"
        )
    if asked.entry not in ENTRIES:
        raise OptionError(
            f"there is no entry {asked.entry!r}", remedy=f"one of {', '.join(ENTRIES)}"
        )
    artifact = is_artifact(asked.source)
    if asked.format in CONTAINERS and not artifact:
        raise OptionError(
            f"{asked.source} is a checkpoint; a {asked.format} is made of an artifact",
            remedy=f"compile it: dcompile {asked.source} -o {asked.out}",
        )
    if artifact and replace(asked.options, dtype="auto") != Options():
        raise OptionError(
            "an artifact's options were chosen when it was compiled",
            where=str(asked.source),
            remedy="leave them out, or export from the checkpoint",
        )
    for package in _NEEDS.get(asked.format, ()):
        if importlib.util.find_spec(package) is None:
            raise BuildError(
                f"exporting to {asked.format} needs the package {package!r}",
                remedy="pip install 'dcompile[export]'",
            )


def _dtype(own: torch.dtype, wanted: str, format: str) -> tuple[torch.dtype, list[str]]:
    """What to compute in; as compiled, or wider, never narrower."""
    if wanted == "auto":
        if format == "onnx" and own == torch.bfloat16:
            note = (
                "computes in float32: onnxruntime's CPU kernels have no bfloat16 "
                "(--dtype bfloat16 keeps it, for others)"
            )
            return torch.float32, [note]
        return own, []
    dtype = getattr(torch, wanted)
    if dtype not in (own, torch.float32):
        raise OptionError(
            f"the artifact computes in {str(own).removeprefix('torch.')}, not in {wanted}",
            remedy=f"--dtype float32, or compile with --dtype {wanted}",
        )
    return dtype, []
