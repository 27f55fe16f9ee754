"""Iteration smoothing: a masked position's embedding leans towards what was predicted there (dInfer).

The next input of a position that stays masked is E[M] + w softmax(z) E. The host gives w of each row; the
mixture is carried by position, and a request begins without any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dcompile.errors import UnsupportedModel

STATE = "soft"


def embeddings(model: nn.Module, mask_id: int) -> nn.Embedding:
    """The table that tokens are looked up in; raises UnsupportedModel."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings > mask_id:
            return module
    raise UnsupportedModel(
        "iteration smoothing changes the tokens' embeddings, and the model has no nn.Embedding",
        remedy="leave --smoothing out",
    )


@contextlib.contextmanager
def softened(table: nn.Embedding, ids: Tensor, mask_id: int, held: Tensor) -> Iterator[None]:
    """Within it, the model finds `held` [R, E] added to the embeddings of masks; ids i64 [1, R]."""
    seen = []

    def add(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if not args or args[0] is not ids:
            return out
        seen.append(module)
        masked = (ids == mask_id)[:, :, None]
        return out + torch.where(masked, held[None], 0.0)

    handle = table.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    if len(seen) != 1:
        raise UnsupportedModel(
            f"the model looks its token ids up {len(seen)} times in the table that smoothing changes",
            remedy="embed the ids once, as they are given; or leave --smoothing out",
        )
