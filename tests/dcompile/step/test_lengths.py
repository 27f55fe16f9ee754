"""A branch on the length is refused where it changes the graph, at whatever length that is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planned import BLOCK
from torch import Tensor, nn

from dcompile.errors import UnsupportedModel
from dcompile.ir.program import Program, StepShape
from dcompile.ir.weights import Source
from dcompile.policies import find_policy
from dcompile.step.trace import Traced, trace

POSITIONS = 300


class Branching(nn.Module):
    """Two layers, and between them what the test asks of the length."""

    def __init__(self, middle: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 61)
        self.middle = middle

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.two(self.middle(self.one(self.embed(ids)), ids.shape[1])))


def traced(middle: Callable[[Tensor, int], Tensor], positions: int = POSITIONS) -> Program:
    model = Branching(middle).eval()
    shape = StepShape(1, positions, BLOCK, 60, torch.float32)
    recipes = {name: Source(name) for name, _ in model.named_parameters()}
    return trace(model, Traced(shape, find_policy("threshold"), recipes))


def longer_than_64(x: Tensor, length: int) -> Tensor:
    return x * 2 if length > 64 else x


def odd(x: Tensor, length: int) -> Tensor:
    return x * 2 if length % 2 else x


def one_length(x: Tensor, length: int) -> Tensor:
    return x * 2 if length == 200 else x


def a_band(x: Tensor, length: int) -> Tensor:
    return x * 2 if length // 16 == 5 else x


def short(x: Tensor, length: int) -> Tensor:
    return x * 2 if length < 9 else x


@pytest.mark.parametrize(
    ("middle", "length"),
    [(longer_than_64, 65), (odd, 2), (one_length, 200), (a_band, 80), (short, 2)],
)
def test_another_branch_is_refused_with_its_line(
    middle: Callable[[Tensor, int], Tensor], length: int
) -> None:
    with pytest.raises(UnsupportedModel, match=f"at {length} positions than at 43") as refused:
        traced(middle)
    assert "test_lengths.py" in str(refused.value.where)
    assert refused.value.remedy is not None
    assert (f"--max-length {length - 1}" in refused.value.remedy) == (length > 43)


def test_the_remedy_of_a_long_branch_works() -> None:
    assert traced(longer_than_64, 64).shape.positions == 64


def test_a_branch_that_changes_nothing_is_no_branch() -> None:
    def spelled_twice(x: Tensor, length: int) -> Tensor:
        return x.reshape(1, length, 8) if length > 50 else x.contiguous().view(1, -1, 8)

    traced(spelled_twice)
