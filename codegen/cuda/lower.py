"""Planned program in; plan, variants and printed sources out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dcompile.codegen.cuda.fitting import Refusals, fit
from dcompile.codegen.cuda.pointwise import FUNCTIONS
from dcompile.codegen.cuda.schedule import Printed, schedule
from dcompile.codegen.cuda.select import EMITTED, Site
from dcompile.codegen.kernels import advance
from dcompile.codegen.launches import Launch
from dcompile.codegen.plan import bind, stored_of
from dcompile.codegen.triton.assemble import PACKAGE
from dcompile.codegen.triton.tiles import ARCHITECTURES
from dcompile.codegen.triton.variant import Number, Variant
from dcompile.ir.program import Program

# The runtime's; see docs/formats.md.
LOOP_MEMORY = ("finished", "performed", "turn", "limit", "go", "wanted")


@dataclass(frozen=True)
class CudaLowered:
    """What a CUDA artifact is made of, but for the weights' bytes and the compiled kernels."""

    plan: dict[str, Any]
    stored: list[tuple[str, str, str]]  # (tensor, input, layout) of every weight and constant
    launches: list[Launch]
    variants: tuple[Variant, ...]  # distinct, in the order of their first launch
    emitted: str  # the module of what was printed for this plan; empty where nothing was
    refused: Refusals = field(default_factory=dict)  # tiles that the gate did not take


def lower(program: Program, architectures: Sequence[int], gated: bool = False) -> CudaLowered:
    """Schedule launches, place values; the program becomes BOUND.

    A plan has one set of tiles: those that fit the chip with the least shared memory of all asked, and
    with `gated` smaller ones where the gate refuses what these are compiled to (`fitting.py`).
    Raises UnsupportedModel where an operator has no kernel, with the operator's name.
    """
    arch = min(architectures, key=lambda a: ARCHITECTURES[a].shared)
    refused: Refusals = {}

    def fitted(sites: Iterable[Site], functions: Mapping[str, str]) -> None:
        text = module_text(Printed(functions=dict(functions)))
        refused.update(fit(sites, architectures, {EMITTED: text} if text else {}))

    plan, printed = schedule(program, arch, fitted if gated else None)
    variants = name_variants(plan.launches)
    text, buffers = bind(program, plan)
    if "done" in text["outputs"]:
        most = program.shape.slots * program.shape.blocks
        (step,) = advance.launches(sequences={"B": 1}, most=most).steps
        text["loop"] = {
            "kernel": step.variant.name,
            "grid": list(step.variant.grid),
            "args": [
                {"i": b.value} if isinstance(b, Number) else _of_loop(text, b.name)
                for b in step.bindings
            ],
        }
        variants.append(step.variant)
    return CudaLowered(
        text, stored_of(buffers), plan.launches, tuple(variants), module_text(printed), refused
    )


def _of_loop(text: dict[str, Any], name: str) -> dict[str, Any]:
    if name in LOOP_MEMORY:
        return {"loop": name}
    return {"b": text["outputs" if name == "done" else "inputs"][name]}


def name_variants(launches: list[Launch]) -> list[Variant]:
    """The distinct variants; of two that differ and are called the same, the second is renamed."""
    found: dict[Variant, str] = {}
    by_content: dict[str, str] = {}
    for launch in launches:
        assert launch.variant is not None
        variant = replace(launch.variant, grid=(1, 1, 1))
        content = repr(replace(variant, name=""))
        if content not in by_content:
            name, count = variant.name, 1
            while name in by_content.values():
                name, count = f"{variant.name}_{count}", count + 1
            by_content[content] = name
            found[replace(variant, name=name)] = name
        launch.kernel = by_content[content]
    return list(found)


def module_text(printed: Printed) -> str:
    """Printed kernels and functions as one module."""
    if not printed.kernels and not printed.functions:
        return ""
    bodies = "".join([*printed.kernels.values(), *printed.functions.values()])
    names = sorted(n for n in FUNCTIONS if f"{n}(" in bodies)
    lines = [
        '"""What was printed for this plan: runs of small operators, and what follows products."""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        *([f"from {PACKAGE}.pointwise import {', '.join(names)}", ""] if names else []),
    ]
    for name, body in printed.functions.items():
        lines += ["", "@triton.jit", f"def {name}(value, other):", body]
    for name, source in printed.kernels.items():
        lines += ["", "@triton.jit", f"def {name}{source}"]
    return "\n".join(lines).rstrip("\n") + "\n"
