"""Compile: frontend -> trace -> passes -> emit, on one screen."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dcompile.codegen.backends import Code, backend_of
from dcompile.codegen.plan import stored_tensors
from dcompile.driver.manifest import manifest_of
from dcompile.driver.origin import Origin, Progress, of_module, open_origin, trace_origin
from dcompile.driver.pipeline import Observer, run
from dcompile.driver.record import Announcer, Record, Recorder
from dcompile.driver.report import report
from dcompile.driver.settle import check_traced, settle
from dcompile.ir.program import Program
from dcompile.ir.show import show
from dcompile.ir.stored import dump
from dcompile.options import Options, WatchedOptions
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.tensors import arrays_of
from dcompile.runtime.writing import ArtifactWriter

log = logging.getLogger(__name__)


def compile_checkpoint(
    path: str | Path, options: Options, out: Path, progress: Progress = log.info
) -> Path:
    """Compile a checkpoint (folder, model.pt, model.pt2) into the artifact `out`."""
    options = WatchedOptions.of(options)
    return _compile(open_origin(Path(path), options), options, out, progress)


def compile_module(
    module: nn.Module, options: Options, out: Path, progress: Progress = log.info
) -> Path:
    """Compile a user's own module `ids i64 [B, T] -> logits [B, T, V]`."""
    options = WatchedOptions.of(options)
    return _compile(of_module(module, options=options), options, out, progress)


def compile_model(
    model: nn.Module | str | Path,
    options: Options | None = None,
    *,
    out: str | Path | None = None,
    **changes: Any,
) -> Runner:
    """Compile a module or a checkpoint's path, and load the result.

    `changes` are fields of Options.  Without `out` the artifact lives in a temporary folder that goes
    with the runner.  Raises DcompileError.
    """
    chosen = replace(options or Options(), **changes)
    if out is not None:
        made = _compile_any(model, chosen, Path(out))
        return Runner.load(made)
    with tempfile.TemporaryDirectory(prefix="dcompile-") as folder:
        # The mapped weights keep their pages after the folder is gone.
        return Runner.load(_compile_any(model, chosen, Path(folder) / "model.dcx"))


def _compile_any(model: nn.Module | str | Path, options: Options, out: Path) -> Path:
    if isinstance(model, nn.Module):
        return compile_module(model, options, out)
    return compile_checkpoint(model, options, out)


def _compile(origin: Origin, options: WatchedOptions, out: Path, progress: Progress) -> Path:
    options.validate()
    settled = settle(options, origin.spec)
    program = trace_origin(origin, settled, progress)
    traced = show(program)
    recorder = Recorder()
    run(program, settled.options, Announcer(progress), recorder, *_checker(options))
    check_traced(settled, program)
    progress("lower and build kernels")
    code = backend_of(settled.target)(program)
    progress("write")
    with ArtifactWriter(out, external=options.weights == "external") as writer:
        writer.add_bytes("plan.json", _json(code.plan))
        writer.add_bytes("program.json", _json(dump(program, code.stored)))
        for name, text in _texts(program, code, traced, recorder.records).items():
            writer.add_bytes(name, text.encode())
        manifest = {**manifest_of(origin, settled, program), **code.manifest}
        notes = {"remarks": [vars(r) for r in program.remarks], "unread": options.unread}
        writer.add_bytes("remarks.json", _json(notes))
        for name, data in code.files.items():
            writer.add_bytes(name, data)
        for name, data in origin.tokenizer.items():
            writer.add_bytes(f"tokenizer/{name}", data)
        writer.add_weights(arrays_of(stored_tensors(program, code.stored, origin.read)))
        writer.finish(manifest)
    return out


def _checker(options: Options) -> list[Observer]:
    if not options.check:
        return []
    from dcompile.driver.check import Checker

    return [Checker()]


def _json(value: object) -> bytes:
    import json

    return (json.dumps(value, indent=1) + "\n").encode()


def _texts(program: Program, code: Code, traced: str, records: list[Record]) -> dict[str, str]:
    out = {"stages/00_traced.txt": traced}
    for i, record in enumerate(records, start=1):
        out[f"stages/{i:02}_{record.name}.txt"] = record.text
    out["report.txt"] = report(program, code, records)
    out.update(code.texts)
    return out
