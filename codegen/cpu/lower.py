"""Planned program in; plan, emitted source and the list of stored tensors out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

from dcompile.codegen.cpu.schedule import schedule
from dcompile.codegen.launches import Launch, Schedule
from dcompile.codegen.plan import bind, stored_of
from dcompile.ir.program import Program


@dataclass(frozen=True)
class Lowered:
    """What the artifact is made of, but for the weights' bytes and the compiled kernels."""

    plan: dict[str, Any]
    source: str  # the emitted functions, as one translation unit; empty where there are none
    stored: list[tuple[str, str, str]]  # (tensor, input, layout) of every weight and constant
    launches: list[Launch]


def lower(program: Program) -> Lowered:
    """Schedule launches, place values, cut regions; the program becomes BOUND."""
    plan = schedule(program)
    text, buffers = bind(program, plan)
    return Lowered(text, _source(plan), stored_of(buffers), plan.launches)


def _source(plan: Schedule) -> str:
    if not plan.sources:
        return ""
    lines = [f'    "{name}  {touches}\\n"' for name, touches in plan.touches.items()]
    says = "EXPORT const char dc_abi[] =\n" + "\n".join(lines) + ";\n"
    return '#include "prelude.h"\n\n' + "\n".join([*plan.sources.values(), says])


def emitted_sources(source: str) -> dict[str, str]:
    """The translation unit with the header it includes, for the builder."""
    prelude = resources.files("dcompile.codegen.cpu").joinpath("prelude.h").read_text()
    return {"step.cpp": source, "prelude.h": prelude}
