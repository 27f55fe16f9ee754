"""The choice of tokens from the vocabulary projection, whose logits are never stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import Operator
from dcompile.ir.operators.choose import (
    ASKED_RESULTS,
    RESULTS,
    choose,
    choose_asked,
    four_like,
    seven_like,
)
from dcompile.ir.work import formulas


def vocab_choice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`choose` of the vocabulary projection: x [B, n, D], weight [V, D]; logits are never stored."""
    logits = torch.nn.functional.linear(x, weight, bias)
    return choose(logits, live, temperature, seed, tick, pos, mask_id)


def vocab_choice_asked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    asked: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`choose_asked` of the vocabulary projection: x [B, n, D], weight [V, D], asked [B, n, S]."""
    logits = torch.nn.functional.linear(x, weight, bias)
    return choose_asked(logits, live, temperature, seed, tick, pos, asked, mask_id)


plain = custom_op("dcompile::vocab_choice", vocab_choice, mutates_args=())
with_asked = custom_op("dcompile::vocab_choice_asked", vocab_choice_asked, mutates_args=())


@plain.register_fake
def _(x, weight, bias, live, temperature, seed, tick, pos, mask_id):  # type: ignore[no-untyped-def]
    return four_like(live)


@with_asked.register_fake
def _(x, weight, bias, live, temperature, seed, tick, pos, asked, mask_id):  # type: ignore[no-untyped-def]
    return seven_like(live, asked)


VOCAB_CHOICE = torch.ops.dcompile.vocab_choice.default
VOCAB_CHOICE_ASKED = torch.ops.dcompile.vocab_choice_asked.default
OPERATOR = Operator(VOCAB_CHOICE, vocab_choice, RESULTS, formulas.vocab_choice)
ASKED = Operator(VOCAB_CHOICE_ASKED, vocab_choice_asked, ASKED_RESULTS, formulas.vocab_choice)
