"""The mixture of embeddings is one operator with the vocabulary projection before it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from check import check_pass, randn
from torch import Tensor

from dcompile.errors import UnsupportedModel
from dcompile.passes.fuse_soft_embed import FuseSoftEmbed

soft_embed = torch.ops.dcompile.soft_embed


def test_logits_are_never_stored() -> None:
    def mixed(
        x: Tensor, live: Tensor, weight: Tensor, head: Tensor, table: Tensor
    ) -> tuple[Tensor]:
        return (soft_embed(F.linear(x, head), table, live, weight),)

    check_pass(
        FuseSoftEmbed(),
        mixed,
        {"x": randn(5, 8), "live": torch.arange(5) > 1, "weight": torch.rand(5)},
        {"head": randn(11, 8), "table": randn(11, 6)},
        after="""
            v0: f32[R, 8] = reshape.default(x, [-1, 8])
            v1: f32[R, 6] = dcompile.vocab_soft_embed(v0, head, None, table, live, weight)
            return (v1,)
        """,
    )


def test_logits_that_are_changed_after_the_projection_are_refused() -> None:
    def capped(
        x: Tensor, live: Tensor, weight: Tensor, head: Tensor, table: Tensor
    ) -> tuple[Tensor]:
        return (soft_embed(F.linear(x, head).tanh(), table, live, weight),)

    with pytest.raises(UnsupportedModel, match=r"linear layer's output(.|\n)*--smoothing"):
        check_pass(
            FuseSoftEmbed(),
            capped,
            {"x": randn(5, 8), "live": torch.arange(5) > 1, "weight": torch.rand(5)},
            {"head": randn(11, 8), "table": randn(11, 6)},
        )
