"""Rows of keys or values at their places in a cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import Operator
from dcompile.ir.work import formulas


def write_rows(cache: Tensor, rows: Tensor, row_seq: Tensor, row_pos: Tensor) -> Tensor:
    """cache [N, L, G, K] with rows [R, G, K] at [row_seq, row_pos]."""
    return cache.index_put((row_seq, row_pos), rows)


registered = custom_op("dcompile::write_rows", write_rows, mutates_args=())


@registered.register_fake
def _(cache, rows, row_seq, row_pos):  # type: ignore[no-untyped-def]
    return torch.empty_like(cache)


WRITE_ROWS = torch.ops.dcompile.write_rows.default
OPERATOR = Operator(WRITE_ROWS, write_rows, ("new_cache",), formulas.write_rows, body=write_rows)
