"""The step as an AOTInductor package: native code and weights in one `.pt2` that torch alone runs."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from dcompile.errors import BuildError, OutputError
from dcompile.export.files import appearing, check_target
from dcompile.export.source import Source, facts
from dcompile.export.step import BODIES, BatchStep, Entry
from dcompile.ir.show import SHORT

SUFFIX = ".pt2"


class _Held(nn.Module):
    """A step with its weights inside."""

    def __init__(self, step: BatchStep, source: Source) -> None:
        super().__init__()
        self.step = step
        for item in step.weights:
            tensor = source.read(item)
            self.register_buffer(f"w_{item.name}", tensor.to(step.widened(item.dtype)))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        held = (self.get_buffer(f"w_{item.name}") for item in self.step.weights)
        out: tuple[Tensor, ...] = self.step(*held, *given)
        return out


def write_pt2(source: Source, out: Path, entry: Entry, dtype: torch.dtype) -> list[Path]:
    """Compile the step into `out`; it takes and returns tensors in the order that its metadata says.

    Holds all weights at once.  Raises OutputError, and BuildError where the code does not compile.
    """
    if out.suffix != SUFFIX:
        what = f"an AOTInductor package is not named {out.name}"
        raise OutputError(what, where=str(out), remedy=f"-o {out.with_suffix(SUFFIX)}")
    check_target(out)
    step = BatchStep(source, entry, dtype, BODIES)
    given, shapes = step.example(source.program.sizes["L"])
    ports = [{"name": p.name, "dtype": SHORT[p.dtype], "shape": list(p.shape)} for p in step.ports]
    said = {**facts(source, entry), "inputs": ports, "outputs": step.outputs}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            _Held(step, source), tuple(given), dynamic_shapes=(tuple(shapes),), strict=False
        )
        # An archive's inner folder is named after its file: always alike, for equal bytes.
        with appearing(out) as folder, tempfile.TemporaryDirectory(dir=folder) as beside:
            package, whole = (Path(beside) / f"{name}{SUFFIX}" for name in ("made", "step"))
            try:
                torch._inductor.aoti_compile_and_package(
                    exported,
                    package_path=str(package),
                    inductor_configs={"aot_inductor.metadata": {"dcompile": json.dumps(said)}},
                )
            except OSError:
                raise
            except Exception as failure:
                first = next(iter(str(failure).splitlines()), "")
                raise BuildError(
                    f"AOTInductor could not compile the step: {type(failure).__name__}: {first}",
                    remedy="it needs a C++ compiler: install g++, or set CXX",
                ) from failure
            _copy_without_commands(package, whole)
            whole.rename(folder / out.name)
    return [out]


def _copy_without_commands(package: Path, to: Path) -> None:
    """The same archive without the comments in its sources that say how they were compiled.

    Inductor adds one to a cached source each time that it is used, with the machine's own paths.
    """
    reader = torch._C.PyTorchFileReader(str(package))
    writer = torch._C.PyTorchFileWriter(str(to))
    for name in reader.get_all_records():
        if name.startswith(".data/"):
            continue  # the writer's own
        data = reader.get_record(name)
        if name.endswith(".cpp"):
            data = data.partition(b"\n// Compile cmd\n")[0].rstrip() + b"\n"
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
