"""The report of a compile."""

from __future__ import annotations

from collections import Counter

from dcompile.codegen.backends import Code
from dcompile.driver.record import Record
from dcompile.ir.program import Program


def report(program: Program, code: Code, records: list[Record]) -> str:
    """Passes with counts, kernels with counts, memory, launches a layer, remarks; no times, so that
    the same compile gives the same bytes."""
    lines = ["pass                    places   nodes before   after"]
    for r in records:
        lines.append(f"{r.name:24}{r.changed:6}{r.nodes_before:15}{r.nodes_after:8}")
    lines += ["", "kernel                                   launches"]
    for kernel, count in Counter(item.kernel for item in code.launches).most_common():
        lines.append(f"{kernel:40}{count:9}")
    per_layer = Counter(
        item["layer"] for item in code.plan["launches"] if item["layer"] is not None
    )
    lines.append("")
    lines.append(
        f"launches  {len(code.launches)}, at most {max(per_layer.values(), default=0)} a layer"
    )
    lines.append(f"regions   {len(code.plan['regions'])}")
    lines.append(f"slots     {code.plan['slots']} for {_slot_values(code)} values")
    if missed := [r for r in program.remarks if r.kind == "missed"]:
        lines += ["", "not done"]
        lines += [f"{r.pass_name}  {r.where}: {r.text}" for r in missed]
    return "\n".join(lines) + "\n"


def _slot_values(code: Code) -> int:
    return sum(b["place"]["kind"] == "slot" for b in code.plan["buffers"])
