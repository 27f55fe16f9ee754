"""RMS norm (Zhang and Sennrich, arXiv 1910.07467), alone and behind a residual addition.

y = s / sqrt(mean(s^2) + eps) * w, with s = x, or s = x + r rounded to the rows' dtype and kept.
One program holds one row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.triton.assemble import Shape, assemble, count, operand, power_of_two
from dcompile.codegen.triton.variant import Expression, Lowering


@triton.jit
def rms_norm(
    y, total, x, r, w, chosen, rows, EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """y, total, x, r [rows, D], w [D]; total and r are absent together.

    With chosen i64 [rows], x has more rows, and row chosen[i] of it goes with row i of the others.
    """
    row = tl.program_id(0).to(tl.int64)
    at = row * D
    i = tl.arange(0, BLOCK)
    inside = i < D
    source = at
    if chosen is not None:
        source = tl.load(chosen + row) * D
    s = tl.load(x + source + i, mask=inside, other=0.0).to(tl.float32)
    if r is not None:
        summed = s + tl.load(r + at + i, mask=inside, other=0.0).to(tl.float32)
        rounded = summed.to(total.dtype.element_ty)
        tl.store(total + at + i, rounded, mask=inside)
        s = rounded.to(tl.float32)
    out = s * (1.0 / tl.sqrt_rn(tl.sum(s * s, 0) / D + EPS))
    if w is not None:
        out = out * tl.load(w + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at + i, out.to(y.dtype.element_ty), mask=inside)


def launches(
    *,
    rows: Expression,
    hidden: int,
    dtype: str,
    eps: float,
    weighted: bool = True,
    add: bool = False,
    weight_dtype: str | None = None,
    chosen: bool = False,
) -> Lowering:
    """rms_norm: operands y, x, w. With `add`, add_rms_norm: also total and r, [rows, hidden].

    With `chosen`, an operand of that name says which rows of x are taken.
    """
    kind = f"{'add_' if add else ''}rms_norm{'_chosen' if chosen else ''}"
    name = f"{kind}_d{hidden}{'' if weighted else '_plain'}_{dtype}"
    step = assemble(
        name,
        "norms:rms_norm",
        [
            operand("y", dtype),
            operand("total", dtype, add),
            operand("x", dtype),
            operand("r", dtype, add),
            operand("w", weight_dtype or dtype, weighted),
            operand("chosen", "i64", chosen),
            count("rows", rows),
        ],
        {"EPS": eps, "D": hidden, "BLOCK": power_of_two(hidden, 32)},
        Shape((rows, 1, 1), warps=_warps(hidden)),
    )
    return Lowering((step,))


def _warps(hidden: int) -> int:
    """Sixteen elements a thread: two 128-bit loads of bfloat16."""
    return max(1, min(16, power_of_two(hidden) // 512))
