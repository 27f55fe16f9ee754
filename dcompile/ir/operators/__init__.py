"""The fused operators, a file each: what one means, its fake, its work, its traceable body.

A pass puts them into the graph, code generation maps them to kernels, `check` and the tests run the
references.  R rows, B sequences, n block length, D hidden size, H query heads, G key heads, K head size.
"""

from __future__ import annotations

from dcompile.ir.operators import (
    add_rms_norm,
    aten,
    attend,
    choose,
    moe_ffn,
    norm_rope_write,
    route,
    route_limited,
    silu_mul,
    soft_embed,
    vocab_choice,
    write_rows,
)
from dcompile.ir.operators.add_rms_norm import ADD_RMS_NORM
from dcompile.ir.operators.attend import ATTEND
from dcompile.ir.operators.base import Operator
from dcompile.ir.operators.choose import CHOOSE, CHOOSE_ASKED
from dcompile.ir.operators.moe_ffn import ACTIVATIONS, MOE_FFN
from dcompile.ir.operators.norm_rope_write import NORM_ROPE_WRITE
from dcompile.ir.operators.route import ROUTE, SCORES
from dcompile.ir.operators.route_limited import ROUTE_LIMITED
from dcompile.ir.operators.silu_mul import SILU_MUL
from dcompile.ir.operators.soft_embed import SOFT_EMBED, VOCAB_SOFT_EMBED
from dcompile.ir.operators.vocab_choice import VOCAB_CHOICE, VOCAB_CHOICE_ASKED
from dcompile.ir.operators.write_rows import WRITE_ROWS

__all__ = [
    "ACTIVATIONS",
    "ADD_RMS_NORM",
    "ATEN",
    "ATTEND",
    "CHOOSE",
    "CHOOSE_ASKED",
    "MOE_FFN",
    "NORM_ROPE_WRITE",
    "OPERATORS",
    "ROUTE",
    "ROUTE_LIMITED",
    "SCORES",
    "SILU_MUL",
    "SOFT_EMBED",
    "VOCAB_CHOICE",
    "VOCAB_CHOICE_ASKED",
    "VOCAB_SOFT_EMBED",
    "WRITE_ROWS",
    "Operator",
]

OPERATORS: tuple[Operator, ...] = (
    write_rows.OPERATOR,
    attend.OPERATOR,
    add_rms_norm.OPERATOR,
    silu_mul.OPERATOR,
    norm_rope_write.OPERATOR,
    route.OPERATOR,
    route_limited.OPERATOR,
    moe_ffn.OPERATOR,
    choose.OPERATOR,
    choose.ASKED,
    vocab_choice.OPERATOR,
    vocab_choice.ASKED,
    soft_embed.OPERATOR,
    soft_embed.OF_ROWS,
)
ATEN: tuple[Operator, ...] = aten.OPERATORS
