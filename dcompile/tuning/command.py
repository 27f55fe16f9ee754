"""What the command line asks of tuning: an artifact or a checkpoint in, a table out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table as Shown

from dcompile.codegen.triton import tuned
from dcompile.errors import OptionError, OutputError
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.cuda.device import Device
from dcompile.runtime.cuda.driver import Driver
from dcompile.runtime.cuda.table import table_of
from dcompile.tuning.measure import Outcome, merged, tune
from dcompile.tuning.problems import problems

Progress = Callable[[str], None]


def tune_path(
    path: Path,
    *,
    families: Sequence[str] = (),
    rows: int = 32,
    most: int = 32,
    out: Path | None = None,
    progress: Progress = lambda text: None,
) -> list[Outcome]:
    """Tune an artifact's kernels, or those of a checkpoint compiled for this GPU; write the table.

    `out` is by default the table of this installation.  Raises DeviceError without a GPU, before anything
    else is done.
    """
    device = Device(Driver())
    with tempfile.TemporaryDirectory(prefix="dcompile-tune-") as folder:
        artifact = _artifact(path, device.arch, Path(folder), progress)
        found = problems(table_of(artifact))
    known = {problem.shape.family for problem in found}
    if unknown := sorted(set(families) - known):
        what = f"the plan has no kernels of family {unknown[0]!r} that can be tuned"
        raise OptionError(what, remedy=f"one of {', '.join(sorted(known)) or 'none'}")
    chosen = [p for p in found if not families or p.shape.family in families]
    outcomes = tune(chosen, device, rows=rows, most=most, progress=progress)
    _write(outcomes, device, out or tuned.path())
    return outcomes


def _artifact(path: Path, arch: int, folder: Path, progress: Progress) -> Artifact:
    from dcompile.driver.compile import compile_checkpoint
    from dcompile.options import Options

    if path.suffix == ".dcx" or (path / "manifest.json").is_file():
        artifact = open_artifact(path, verify=False)
        if artifact.manifest["target"] != "cuda":
            what = f"the artifact is for {artifact.manifest['target']!r}: it has no kernels to tune"
            raise OptionError(what, where=str(path), remedy=f"--target cuda:sm_{arch}")
        return artifact
    progress("compiling the checkpoint")
    made = compile_checkpoint(path, Options(target=f"cuda:sm_{arch}"), folder / "a.dcx", progress)
    return open_artifact(made, verify=False)


def _write(outcomes: Sequence[Outcome], device: Device, out: Path) -> None:
    try:
        before = tuned.read(out.read_text()) if out.exists() else {}
        out.write_text(tuned.written(merged(before, outcomes, device.arch, device.name)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the table of tiles cannot be read or written: {error}"
        raise OutputError(what, where=str(out), remedy="name another place with --out") from error


def shown(outcomes: Sequence[Outcome]) -> Shown:
    """One line a shape: the default's time and the winner's."""
    table = Shown("shape", "tried", "default us", "best us", "best tiles", box=None)
    for outcome in outcomes:
        best, before = outcome.best, outcome.default.seconds
        ran = sum(trial.seconds is not None for trial in outcome.trials)
        table.add_row(
            outcome.problem.shape.key,
            f"{ran} of {len(outcome.trials)}",
            "-" if before is None else f"{before * 1e6:.1f}",
            "-" if best is None or best.seconds is None else f"{best.seconds * 1e6:.1f}",
            "none ran: " + outcome.default.refused if best is None else str(best.tiles),
        )
    return table
