"""What an attention mask lets each position see, proven over the lengths that a program may have."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from dcompile.errors import UnsupportedModel
from dcompile.ir.evaluate import ancestors, evaluate, evaluate_part, probe_lengths
from dcompile.ir.program import Program

# Up to here a mask is evaluated whole: 16 million pairs.
WHOLE = 4096
PART = 256

NEITHER = -1


def mask_block(mask: Node, program: Program) -> int | None:
    """Block length of a mask that depends on positions only; None where all positions see each other.

    The rule is read at the compiled maximum length, where every shorter length's mask must be its
    corner: all rows of it are compared, and those of every length in `probe_lengths`.  A mask that is
    full at the maximum is block-causal all the same where twice as many positions show it, so that a
    short compile knows the model's blocks.
    NEITHER where no rule can hold; whether the rule does is what `first_departure` asks.
    """
    most = program.shape.positions
    block = _read(mask, program, most)
    if block is None and 2 * most < WHOLE:
        block = _longer(mask, program, 2 * most + 1)
    return block


def first_departure(mask: Node, program: Program, block: int | None) -> tuple[int, int] | None:
    """The first (length, row) at which a mask is not the rule's, of `probe_lengths`; None where it is."""
    lengths = probe_lengths(mask, program)
    # A long mask takes seconds; what only the length changes shows among the shorter ones too.
    for length in [n for n in lengths if n <= WHOLE or n == lengths[-1]]:
        row = _departure(mask, program, length, block)
        if row is not None:
            return length, row
    return None


def _departure(mask: Node, program: Program, length: int, block: int | None) -> int | None:
    for begin, rows in _rows(mask, program, length):
        wrong = (rows != _rule(begin, rows.shape[0], length, block)).any(-1)
        if bool(wrong.any()):
            return begin + int(wrong.nonzero()[0])
    return None


def same_value(node: Node) -> object:
    """A key that two nodes share only if they compute the same value."""
    places: dict[Node, int] = {}
    lines = []
    for step in ancestors(node):
        places[step] = len(places)
        given = map_arg((step.args, step.kwargs), lambda n: f"%{places.get(n, n)}")
        lines.append((step.op, str(step.target), repr(given)))
    return tuple(lines)


def _longer(mask: Node, program: Program, length: int) -> int | None:
    """The block length that more positions show than are compiled; None where they show no rule."""
    try:
        block = _read(mask, program, length)
        held = block != NEITHER and _departure(mask, program, length, block) is None
    except (RuntimeError, IndexError, ValueError):
        # A table may end at the maximum length.
        return None
    return block if held else None


def _read(mask: Node, program: Program, length: int) -> int | None:
    """The block length that the first row says; None for a full row, NEITHER for no mask of pairs."""
    first = next(_rows(mask, program, length))[1][0]
    seen = int(first.sum())
    if seen == length:
        # Full, or chunks that look forward: the rule of a full mask is compared afterwards.
        return None
    return seen if seen and bool(first[:seen].all()) else NEITHER


def _rule(begin: int, count: int, length: int, block: int | None) -> torch.Tensor:
    if block is None:
        return torch.ones(count, length, dtype=torch.bool)
    at = torch.arange(length) // block
    return at[None, :] <= at[begin : begin + count, None]


def _rows(mask: Node, program: Program, length: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, which keys each row sees [rows, length]) of a mask, a part at a time where it is long.

    Raises UnsupportedModel for a mask of real biases, and one that differs by head.
    """
    if length <= WHOLE:
        yield 0, _seen(evaluate(mask, program, length), length, length)
        return
    for begin in range(0, length, PART):
        part = slice(begin, min(begin + PART, length))
        values = evaluate_part(mask, program, length, part)
        if values is None:
            raise UnsupportedModel(
                f"the attention mask of {length} positions can only be computed whole",
                remedy=f"--max-length {WHOLE}, or a mask that compares positions",
            )
        yield begin, _seen(values, part.stop - begin, length)


def _seen(mask: torch.Tensor, count: int, length: int) -> torch.Tensor:
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min / 2
        if not bool(((mask == 0) | (mask <= lowest)).all()):
            raise UnsupportedModel(
                "the attention mask adds a bias", remedy="a mask that is 0 or minus infinity"
            )
        mask = mask == 0
    flat = mask.reshape(-1, mask.shape[-2] if mask.dim() > 1 else 1, mask.shape[-1])
    if not bool((flat == flat[:1]).all()):
        raise UnsupportedModel(
            "the attention mask differs by head", remedy="one mask for all heads of a layer"
        )
    if flat.shape[1] not in (1, count):
        raise UnsupportedModel("the attention mask is for other queries than the sequence's own")
    return flat[0].expand(count, length)
