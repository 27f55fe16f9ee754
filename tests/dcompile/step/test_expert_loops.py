"""Loops that pick tokens by their data: the same values when run, masks when traced, or an error by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcompile.errors import DataDependentShape
from dcompile.step.expert_loops import traceable

WEIGHT = torch.randn(8, 8)


def loop(x: Tensor, chosen: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    hot = F.one_hot(chosen, 4).permute(2, 1, 0)
    for e in torch.greater(hot.sum((-1, -2)), 0).nonzero():
        slot, row = torch.where(hot[e[0]])
        left, right = F.linear(x[row], WEIGHT).chunk(2, -1)
        part = F.silu(left) * right
        y[:, :4].index_add_(0, row, (part * (1 + slot_weight(chosen)[row, slot, None])).to(y.dtype))
    return y


def slot_weight(chosen: Tensor) -> Tensor:
    return chosen.float() / 7


def squeezed(x: Tensor, chosen: Tensor) -> Tensor:
    """The experts' numbers [1] pick an axis of size 1, which is squeezed away."""
    y = torch.zeros_like(x)
    hot = F.one_hot(chosen, 4).permute(2, 1, 0)
    for e in torch.greater(hot.sum((-1, -2)), 0).nonzero():
        slot, row = torch.where(hot[e].squeeze(0))
        y = y.index_add(0, row, x[row] * slot_weight(chosen)[row, slot, None])
    return y


def numbers(x: Tensor, chosen: Tensor) -> Tensor:
    """The experts' numbers without axes: nothing to squeeze."""
    y = torch.zeros_like(x)
    hot = F.one_hot(chosen, 4).permute(2, 1, 0)
    for e in torch.greater(hot.sum((-1, -2)), 0).nonzero().squeeze(-1):
        slot, row = torch.where(hot[e])
        y = y.index_add(0, row, x[row] * slot_weight(chosen)[row, slot, None])
    return y


def batched(x: Tensor, chosen: Tensor) -> Tensor:
    """Masks of a batch of one keep its axis."""
    y, x, chosen = torch.zeros_like(x), x[None], chosen[None]
    for e in range(4):
        batch, row, _ = torch.where(chosen == e)
        y = y.index_add(0, row, x[batch, row] * (e + 1))
    return y


def where(x: Tensor, chosen: Tensor) -> Tensor:
    y = x.clone()
    for e in range(4):
        row, _ = torch.where(chosen == e)
        y = y.index_add(0, row, torch.tanh(x[row] @ WEIGHT) * (e + 1))
    return y


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("fn", [loop, squeezed, numbers, batched, where])
def test_masks_add_what_the_loop_adds(fn: Callable[[Tensor, Tensor], Tensor], slots: int) -> None:
    x, chosen = torch.randn(9, 8), torch.rand(9, 3).topk(slots).indices
    chosen[chosen == 1] = 3  # nothing goes to expert 1; some rows go to 3 twice
    wanted = fn(x, chosen)
    with traceable(nn.Module()):
        got = fn(x, chosen)
    torch.testing.assert_close(got, wanted)


def counts(x: Tensor, mask: Tensor) -> Tensor:
    return x * len(mask.nonzero()[0])


def averages(x: Tensor, mask: Tensor) -> Tensor:
    (row,) = torch.where(mask)
    return x[row].mean(0)


def attends(x: Tensor, mask: Tensor) -> Tensor:
    (row,) = torch.where(mask)
    return x[row].softmax(0)


def loops(x: Tensor, mask: Tensor) -> Tensor:
    for i in mask.nonzero():
        x = x * i
    return x


def another_mask(x: Tensor, mask: Tensor) -> Tensor:
    (row,), (other,) = torch.where(mask), torch.where(~mask)
    return x.index_add(0, row, x[other])


def hits_of_another_mask(x: Tensor, mask: Tensor) -> Tensor:
    pair = torch.stack((mask, mask))
    for e in torch.greater(pair.sum(1), 0).nonzero():
        (row,) = torch.where(~pair[e[0]])
        x = x.index_add(0, row, x[row])
    return x


def many(x: Tensor, mask: Tensor) -> Tensor:
    (row,) = torch.where(mask)
    return x if row.numel() > 3 else x * 2


@pytest.mark.parametrize(
    "fn", [counts, averages, attends, loops, another_mask, many, hits_of_another_mask]
)
def test_what_is_no_such_loop_is_an_error(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    with traceable(nn.Module()), pytest.raises(DataDependentShape, match="depends on its data"):
        fn(torch.randn(5, 8), torch.tensor([True, False, True, True, False]))
