"""The operators of ATen that have kernels of their own; their names in `work` are those of ATen."""

from __future__ import annotations

import torch

from dcompile.ir.operators.base import Operator
from dcompile.ir.work import formulas

aten = torch.ops.aten
LINEAR = aten.linear.default
RMS_NORM = aten.rms_norm.default
EMBEDDING = aten.embedding.default
INDEX_SELECT = aten.index_select.default
OPERATORS = (
    Operator(LINEAR, LINEAR, ("y",), formulas.linear, body=LINEAR),
    Operator(RMS_NORM, RMS_NORM, ("y",), formulas.rms_norm, body=RMS_NORM),
    Operator(EMBEDDING, EMBEDDING, ("out",), formulas.embedding, body=EMBEDDING),
    Operator(INDEX_SELECT, INDEX_SELECT, ("out",), formulas.gather, body=INDEX_SELECT),
)
