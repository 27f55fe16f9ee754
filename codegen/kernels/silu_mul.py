"""y = act(gate) * up, where gate and up may be column slices of one wider matrix (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.triton.assemble import (
    PACKAGE,
    Shape,
    assemble,
    cdiv,
    count,
    operand,
    power_of_two,
)
from dcompile.codegen.triton.variant import Expression, Lowering


@triton.jit
def activate_and_multiply(
    y,
    gate,
    up,
    rows,
    ACTIVATION: tl.constexpr,
    F: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [rows, F]; row r of gate and up starts at r times their stride."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < F
    g = tl.load(gate + row * GATE_STRIDE + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * UP_STRIDE + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * F + i, (ACTIVATION(g) * u).to(y.dtype.element_ty), mask=inside)


def launches(
    *,
    rows: Expression,
    width: int,
    dtype: str,
    gate_stride: int | None = None,
    up_stride: int | None = None,
    activation: str = "silu",
) -> Lowering:
    """Operands y [rows, width], gate, up; strides in elements, `width` where they are whole matrices.

    gate and up are taken to start at multiples of 16 bytes; see `variant.unaligned` where they do not.
    """
    strides = (gate_stride or width, up_stride or width)
    block = min(1024, power_of_two(width, 32))
    suffix = "" if strides == (width, width) else f"s{strides[0]}s{strides[1]}"
    step = assemble(
        f"{activation}_mul_f{width}{suffix}_{dtype}",
        "silu_mul:activate_and_multiply",
        [operand("y", dtype), operand("gate", dtype), operand("up", dtype), count("rows", rows)],
        {
            "ACTIVATION": f"{PACKAGE}.pointwise:{activation}",
            **{"F": width, "GATE_STRIDE": strides[0], "UP_STRIDE": strides[1], "BLOCK": block},
        },
        Shape((rows, cdiv(width, block), 1), warps=max(1, block // 256)),
    )
    return Lowering((step,))
