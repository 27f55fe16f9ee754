"""What only the chosen rows need is computed for them alone."""

from __future__ import annotations

import torch
from planned import BLOCK, Model, planned

from dcompile.ir import operators
from dcompile.ir.edit import value
from dcompile.ir.sizes import size_of

aten = torch.ops.aten


def test_only_chosen_rows_are_projected_and_all_keys_are_written() -> None:
    program = planned(Model(), skip=("fuse_vocab_choice",))
    head = next(n for n in program.calls(aten.linear.default) if value(n).shape[-1] == 61)
    rows = size_of(value(head).shape[-2], program.symbols)
    assert rows == {"B": BLOCK}
    (write,) = program.calls(operators.NORM_ROPE_WRITE)
    assert size_of(value(write.args[0]).shape[0], program.symbols) == {"R": 1}  # type: ignore[arg-type]
