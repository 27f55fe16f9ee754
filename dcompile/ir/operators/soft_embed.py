"""The mixture of the table's rows by a row's probabilities, of logits and of their projection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import NEG_INF, Operator
from dcompile.ir.work import formulas


def soft_embed(logits: Tensor, table: Tensor, live: Tensor, weight: Tensor) -> Tensor:
    """weight[r] * softmax(logits[r]) @ table for live rows, 0 elsewhere.

    logits [R, V], table [V, E], live bool [R], weight f32 [R] -> [R, E] of the table's dtype; the
    product in float32, rounded once.
    """
    z = logits.float()
    p = torch.softmax(torch.where(z.isnan(), NEG_INF, z), -1)
    p = torch.where(p.isnan(), 0.0, p)
    # A table may have more rows than the model has logits.
    mixed = weight[:, None] * (p @ table[: p.shape[1]].float())
    return torch.where(live[:, None], mixed, 0.0).to(table.dtype)


def vocab_soft_embed(
    x: Tensor,
    head: Tensor,
    bias: Tensor | None,
    table: Tensor,
    live: Tensor,
    weight: Tensor,
) -> Tensor:
    """`soft_embed` of the vocabulary projection: x [R, D], head [V, D]; logits are never stored."""
    logits = torch.nn.functional.linear(x, head, bias)
    return soft_embed(logits, table, live, weight)


of_logits = custom_op("dcompile::soft_embed", soft_embed, mutates_args=())
of_rows = custom_op("dcompile::vocab_soft_embed", vocab_soft_embed, mutates_args=())


@of_logits.register_fake
def _(logits, table, live, weight):  # type: ignore[no-untyped-def]
    return table.new_empty((weight.shape[0], table.shape[1]))


@of_rows.register_fake
def _(x, head, bias, table, live, weight):  # type: ignore[no-untyped-def]
    return table.new_empty((weight.shape[0], table.shape[1]))


SOFT_EMBED = torch.ops.dcompile.soft_embed.default
VOCAB_SOFT_EMBED = torch.ops.dcompile.vocab_soft_embed.default
OPERATOR = Operator(SOFT_EMBED, soft_embed, ("y",), formulas.soft_embed)
OF_ROWS = Operator(VOCAB_SOFT_EMBED, vocab_soft_embed, ("y",), formulas.vocab_soft_embed)
