"""Slots of memory: shared where lives are apart."""

from __future__ import annotations

import itertools

from planned import Model, planned

from dcompile.codegen.cpu.lower import lower
from dcompile.ir.program import Stage


def test_slots_are_shared_only_by_values_whose_lives_are_apart() -> None:
    program = planned(Model())
    lowered = lower(program)
    assert program.stage is Stage.BOUND
    plan = lowered.plan
    slot_of = {
        i: b["place"]["slot"] for i, b in enumerate(plan["buffers"]) if b["place"]["kind"] == "slot"
    }

    def root(index: int) -> int:
        place = plan["buffers"][index]["place"]
        return root(place["of"]) if place["kind"] == "view" else index

    born, last = {}, {}
    for at, launch in enumerate(plan["launches"]):
        for index in launch["writes"]:
            born[index] = at
        for argument in launch["args"]:
            if isinstance(argument, dict) and argument.get("b") is not None:
                last[root(argument["b"])] = at
    end = len(plan["launches"])
    for index in plan["outputs"].values():
        last[root(index)] = end
    by_slot: dict[int, list[int]] = {}
    for index, slot in slot_of.items():
        by_slot.setdefault(slot, []).append(index)
    assert len(by_slot) < len(slot_of)
    for shared in by_slot.values():
        lives = sorted((born[i], last.get(i, born[i])) for i in shared)
        for (_, ended), (begun, _) in itertools.pairwise(lives):
            assert ended < begun
