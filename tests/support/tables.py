"""The tables in which every operator stands, each with its list of exceptions."""

from __future__ import annotations

from collections.abc import Mapping

from dcompile.bench import eager
from dcompile.codegen.cpu import select as cpu
from dcompile.codegen.cuda import select as cuda
from dcompile.export import onnx_model, step

TABLES: Mapping[str, tuple[Mapping[object, object], Mapping[object, str]]] = {
    "CPU selectors": (cpu.TABLE, cpu.WITHOUT_KERNEL),
    "CUDA selectors": (cuda.TABLE, cuda.WITHOUT_KERNEL),
    "bodies for .pt2": (step.BODIES, step.WITHOUT_BODY),
    "functions of ONNX": (onnx_model.TRANSLATIONS, onnx_model.WITHOUT_FUNCTION),
    "the eager rival": (eager.BODIES, eager.AS_THEY_STAND),
}


def missing(overload: object) -> list[str]:
    """The tables in which an operator neither stands nor is excused."""
    return [name for name, (table, why) in TABLES.items() if overload not in {*table, *why}]
