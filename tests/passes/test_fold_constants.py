"""What no input changes is computed while compiling."""

from __future__ import annotations

import torch
from planned import POSITIONS, Model, count, planned

aten = torch.ops.aten


def test_rotary_tables_are_folded_to_the_compiled_length() -> None:
    program = planned(Model(), stop_after="fold_constants")
    assert not count(program, aten.arange.default, aten.cos.default, aten.sin.default)
    assert {t.shape[0] for t in program.constants.values()} == {POSITIONS}
    table = next(iter(program.constants.values()))
    angles = torch.arange(POSITIONS)[:, None] / 7.0 * torch.ones(8)
    wanted = {"cos": angles.cos(), "sin": angles.sin()}
    flat = table.reshape(POSITIONS, 8)
    assert any(torch.equal(flat, w) for w in wanted.values())
