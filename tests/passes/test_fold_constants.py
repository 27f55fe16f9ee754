"""What no input changes is computed while compiling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planned import POSITIONS, Model, count, planned
from torch import Tensor

from dcompile.errors import UnsupportedModel

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


def of_length(change: Callable[[Tensor, int], Tensor]) -> Model:
    class Lengths(Model):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + change(torch.arange(ids.shape[1]), ids.shape[1])

    return Lengths()


@pytest.mark.parametrize(
    "change",
    [
        lambda at, n: (at * 0 + 1).sum().log(),
        lambda at, n: (at * 100 // n)[:, None].float(),
        lambda at, n: (at.flip(0) * 0.1)[:, None],
        lambda at, n: torch.where(at.amax() > 30, 2.0, 1.0),
        lambda at, n: (at / at.amax().clamp_min(20))[:, None],
        lambda at, n: (at.sum() % 7).float(),
    ],
)
def test_values_that_depend_on_the_length_are_refused(
    change: Callable[[Tensor, int], Tensor],
) -> None:
    """By name, with the graph's line: a table is made at the compiled length only."""
    with pytest.raises(UnsupportedModel, match="depends on the length of the sequence") as refused:
        planned(of_length(change))
    assert refused.value.where is not None and refused.value.remedy is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda at, n: (at % 7)[:, None].float(),
        lambda at, n: (at.float() / 10000).sin()[:, None],
        lambda at, n: at.cumsum(0)[:, None].float().log1p(),
        lambda at, n: torch.ones(3).sum(),
    ],
)
def test_values_of_each_position_become_tables(change: Callable[[Tensor, int], Tensor]) -> None:
    planned(of_length(change), stop_after="fold_constants")
