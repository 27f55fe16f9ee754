"""How long each pass takes: the passes run again over the checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dcompile.driver.origin import open_origin, trace_origin
from dcompile.driver.pipeline import run
from dcompile.driver.settle import settle
from dcompile.options import recorded_options
from dcompile.runtime.artifact import open_artifact


def pass_times(path: str | Path, checkpoint: Path) -> str:
    """The passes run again over the checkpoint's graph, timed: an artifact holds no times, so that
    the same compile gives the same bytes."""
    recorded = open_artifact(Path(path), verify=False).manifest["options"]
    given = recorded_options(recorded, str(path))
    origin = open_origin(checkpoint, given)
    options = settle(given, origin.spec)
    start = time.perf_counter()
    program = trace_origin(origin, options, getattr(torch, options.dtype), lambda text: None)
    lines = [f"{'pass':24}{'places':>6}{'nodes':>8}{'ms':>9}"]
    lines.append(f"{'trace':30}{len(program.nodes()):8}{(time.perf_counter() - start) * 1e3:9.1f}")
    for r in run(program, options):
        lines.append(f"{r.name:24}{r.changed:6}{r.nodes_after:8}{r.seconds * 1e3:9.1f}")
    return "\n".join(lines) + "\n"
