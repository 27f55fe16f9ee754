"""A mask is what it is at every length up to the compiled one, whatever it looks like at some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from check import small_program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node

from dcompile.errors import UnsupportedModel
from dcompile.ir.evaluate import evaluate, evaluate_part
from dcompile.ir.program import Program
from dcompile.passes import mask_blocks
from dcompile.passes.mask_blocks import NEITHER, first_departure, mask_block, same_value

Mask = Callable[[int], Tensor]


def blocks(n: int) -> Mask:
    def mask(length: int) -> Tensor:
        at = torch.arange(length) // n
        return at[None, :] <= at[:, None]

    return mask


def window(left: int, right: int) -> Mask:
    def mask(length: int) -> Tensor:
        at = torch.arange(length)
        ahead = at[None, :] - at[:, None]
        return (ahead >= -left) & (ahead <= right)

    return mask


def chunks(n: int) -> Mask:
    def mask(length: int) -> Tensor:
        at = torch.arange(length) // n
        return at[None, :] == at[:, None]

    return mask


def made(mask: Mask, positions: int) -> tuple[Node, Program]:
    program = small_program(lambda x: mask(x.shape[0]), {"x": torch.zeros(43)})
    program.shape = replace(program.shape, positions=positions)
    (values,) = program.result().args
    return values[0], program  # type: ignore[index,return-value]


def found(mask: Mask, positions: int) -> object:
    """The block length, or "neither"."""
    node, program = made(mask, positions)
    block = mask_block(node, program)
    wrong = block == NEITHER or first_departure(node, program, block) is not None
    return "neither" if wrong else block


@pytest.mark.parametrize("n", [1, 3, 32, 96, 131, 150, 256, 419])
def test_blocks_of_any_length_are_found(n: int) -> None:
    assert found(blocks(n), 420) == n
    assert found(lambda length: blocks(n)(length).to(torch.float32).log(), 420) == n


def test_a_short_compile_knows_long_blocks() -> None:
    assert found(blocks(64), 40) == 64


@pytest.mark.parametrize("n", [5, 96, 131, 150, 300, 418])
def test_windows_and_chunks_are_seen_however_long(n: int) -> None:
    for mask in (window(n, n), window(n, 0), window(0, n), window(1 << 20, n), chunks(n)):
        assert found(mask, 420) == "neither"


def test_what_begins_beyond_the_compiled_length_is_not_there() -> None:
    assert found(window(420, 420), 420) is None
    assert found(chunks(420), 420) is None


def test_a_mask_that_the_length_changes() -> None:
    """Full at the maximum and at most lengths; windows of a share of the length."""
    assert found(lambda n: window(n // 2 + 200, n)(n), 420) == "neither"
    assert found(lambda n: blocks(4)(n) | (torch.arange(n) >= 400).any(), 420) == "neither"


@pytest.mark.parametrize("positions", [5000, 6001])
def test_long_masks_are_compared_in_parts(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(blocks(700), positions) == 700
    assert found(window(4500, 4500), positions) == "neither"
    # Its diagonal product is no value of one pair: only the whole could say, and that is too large.
    with pytest.raises(UnsupportedModel, match="can only be computed whole"):
        found(lambda n: torch.ones(n, n).cumsum(0) > 0, positions)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 90), st.integers(1, 40), st.integers(0, 40), st.integers(0, 5), st.data())
def test_a_part_is_what_the_whole_has_there(
    length: int, n: int, left: int, kind: int, data: st.DataObject
) -> None:
    masks: list[Mask] = [
        blocks(n),
        lambda t: window(left, n)(t)[None, None],
        lambda t: torch.where(blocks(n)(t), 0.0, float("-inf"))[None],
        lambda t: torch.ones(t, t, dtype=torch.bool).tril(left - 20),
        lambda t: torch.full((t, t), -1.0).triu(n).expand(1, 2, -1, -1),
        lambda t: (torch.arange(t) < n)[None, :] | chunks(n)(t),
    ]
    node, program = made(masks[kind], length)
    begin = data.draw(st.integers(0, length - 1))
    part = slice(begin, data.draw(st.integers(begin + 1, length)))
    got = evaluate_part(node, program, length, part)
    whole = evaluate(node, program, length)
    assert got is not None and torch.equal(got, whole[..., part, :])


def test_masks_that_no_rule_fits_are_named() -> None:
    biased, program = made(lambda n: torch.arange(n)[None, :].float().expand(n, n), 64)
    with pytest.raises(UnsupportedModel, match="adds a bias"):
        mask_block(biased, program)
    heads, program = made(lambda n: torch.stack((blocks(1)(n), blocks(2)(n))), 64)
    with pytest.raises(UnsupportedModel, match="differs by head"):
        mask_block(heads, program)


def test_equal_masks_are_proven_once() -> None:
    program = small_program(
        lambda x: (blocks(3)(x.shape[0]), blocks(3)(x.shape[0]), blocks(4)(x.shape[0])),
        {"x": torch.zeros(43)},
        canonical=False,
    )
    (values,) = program.result().args
    a, b, c = (same_value(node) for node in values)  # type: ignore[union-attr,arg-type]
    assert a == b != c
    assert 2 * program.shape.positions <= mask_blocks.WHOLE
