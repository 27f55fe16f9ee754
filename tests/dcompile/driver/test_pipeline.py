"""All passes in their order, on a whole step."""

from __future__ import annotations

import torch
from planned import Model, count, planned

from dcompile.ir import ops

aten = torch.ops.aten


def test_all_of_it_is_fused() -> None:
    program = planned(Model())
    assert count(program, ops.NORM_ROPE_WRITE) == count(program, ops.ATTEND) == 1
    assert count(program, ops.ROUTE) == count(program, ops.MOE_FFN) == 1
    assert count(program, ops.VOCAB_CHOICE) == 1
    assert not count(program, aten.einsum.default, ops.CHOOSE, ops.WRITE_ROWS)
