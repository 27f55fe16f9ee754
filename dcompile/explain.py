"""What the compiler did, in words: the report of a compile, the stages, the diff of one pass."""

from __future__ import annotations

import difflib
from collections import Counter
from pathlib import Path

from dcompile.codegen.lower import Lowered
from dcompile.errors import OptionError
from dcompile.ir.program import Program
from dcompile.pipeline import Record
from dcompile.runtime.artifact import Artifact, open_artifact


def report(program: Program, lowered: Lowered, records: list[Record]) -> str:
    """Passes with counts, kernels with counts, memory, launches a layer, remarks; no times, so that
    the same compile gives the same bytes."""
    lines = ["pass                    places   nodes before   after"]
    for r in records:
        lines.append(f"{r.name:24}{r.changed:6}{r.nodes_before:15}{r.nodes_after:8}")
    lines += ["", "kernel                                   launches"]
    for kernel, count in Counter(item.kernel for item in lowered.launches).most_common():
        lines.append(f"{kernel:40}{count:9}")
    per_layer = Counter(
        item["layer"] for item in lowered.plan["launches"] if item["layer"] is not None
    )
    lines.append("")
    lines.append(
        f"launches  {len(lowered.launches)}, at most {max(per_layer.values(), default=0)} a layer"
    )
    lines.append(f"regions   {len(lowered.plan['regions'])}")
    lines.append(f"slots     {lowered.plan['slots']} for {_slot_values(lowered)} values")
    if program.remarks:
        lines += ["", "not done"]
        lines += [f"{r.pass_name}  {r.where}: {r.text}" for r in program.remarks]
    return "\n".join(lines) + "\n"


def _slot_values(lowered: Lowered) -> int:
    return sum(b["place"]["kind"] == "slot" for b in lowered.plan["buffers"])


def explain(path: str | Path, pass_name: str | None = None) -> str:
    """The report of an artifact; with a pass, what it changed as a unified diff."""
    artifact = open_artifact(Path(path), verify=False)
    stages = [name for name in artifact.names if name.startswith("stages/")]
    if pass_name is None:
        names = ", ".join(_pass_of(s) for s in stages)
        return artifact.text("report.txt") + f"\nstages    {names}\n"
    sites = [i for i, s in enumerate(stages) if _pass_of(s) == pass_name]
    if not sites:
        raise OptionError(
            f"no pass named {pass_name!r} changed this program",
            remedy=f"one of {', '.join(dict.fromkeys(_pass_of(s) for s in stages[1:]))}",
        )
    return "".join(_diff(artifact, stages, i) for i in sites)


def _pass_of(stage: str) -> str:
    return Path(stage).stem.partition("_")[2]


def _diff(artifact: Artifact, stages: list[str], at: int) -> str:
    if at == 0:
        return artifact.text(stages[0])
    before, after = (artifact.text(s).splitlines(keepends=True) for s in stages[at - 1 : at + 1])
    return "".join(difflib.unified_diff(before, after, stages[at - 1], stages[at], n=1))
