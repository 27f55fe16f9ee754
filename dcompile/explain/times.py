"""How long each pass takes: the passes run again over the checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

from dcompile.driver.origin import open_origin, trace_origin
from dcompile.driver.pipeline import run
from dcompile.driver.record import Recorder
from dcompile.driver.settle import settle
from dcompile.options import recorded_options
from dcompile.runtime.artifact import open_artifact


def pass_times(path: str | Path, checkpoint: Path) -> str:
    """The passes run again over the checkpoint's graph, timed: an artifact holds no times, so that
    the same compile gives the same bytes."""
    recorded = open_artifact(Path(path), verify=False).manifest["options"]
    given = recorded_options(recorded, str(path))
    origin = open_origin(checkpoint, given)
    settled = settle(given, origin.spec)
    start = time.perf_counter()
    program = trace_origin(origin, settled, lambda text: None)
    lines = [f"{'pass':24}{'places':>6}{'nodes':>8}{'ms':>9}"]
    lines.append(f"{'trace':30}{len(program.nodes()):8}{(time.perf_counter() - start) * 1e3:9.1f}")
    recorder = Recorder()
    run(program, settled.options, recorder)
    for r in recorder.records:
        lines.append(f"{r.name:24}{r.changed:6}{r.nodes_after:8}{r.seconds * 1e3:9.1f}")
    return "\n".join(lines) + "\n"
