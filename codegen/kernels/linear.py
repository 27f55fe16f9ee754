"""y = epilogue(x W^T + b) for few rows: weights are streamed once, the sum over k may be split.

A program owns a tile of rows and columns and one of `splits` equal runs of k.  Partial sums go to
scratch, and the last program of a tile to arrive adds them in their order, so the result does not
depend on which one that is (split-K with an ordered fix-up; Osama et al., Stream-K, arXiv 2301.03598).

`gated` multiplies two products: y = act(x Wg^T + bg) * (x Wu^T + bu), W [2 N, K] with the gate first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.kernels.dot import arrives_last, rows_by_rows
from dcompile.codegen.triton.assemble import (
    PACKAGE,
    Argument,
    Shape,
    assemble,
    cdiv,
    count,
    operand,
    temporary,
)
from dcompile.codegen.triton.tiles import Tiles, gated_tiles, linear_tiles, shrunk
from dcompile.codegen.triton.variant import ConstantValue, Expression, Lowering, Scratch


@triton.jit
def linear(
    y,
    x,
    w,
    bias,
    other,
    partial,
    ticket,
    rows,
    EPILOGUE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y, other [rows, N], x [rows, K], w [N, K], bias [N]; partial f32 [SPLITS, rows, N]."""
    SPAN: tl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS) * BK
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    live = row < rows
    inside = column < N
    here = live[:, None] & inside[None, :]
    place = row[:, None] * N + column[None, :]
    start = tl.program_id(2) * SPAN
    end = tl.minimum(start + SPAN, K)
    acc = rows_by_rows(x + row * K, w + column * K, live, inside, start, end, K, BM, BN, BK)
    if SPLITS > 1:
        tl.store(partial + tl.program_id(2) * rows * N + place, acc, mask=here)
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if arrives_last(ticket + tile, SPLITS):
            total = tl.zeros([BM, BN], tl.float32)
            for split in range(SPLITS):
                part = partial + split * rows * N + place
                total += tl.load(part, mask=here, other=0.0, cache_modifier=".cg")
            finish(y, bias, other, total, place, column, here, inside, EPILOGUE)
    else:
        finish(y, bias, other, acc, place, column, here, inside, EPILOGUE)


@triton.jit
def finish(y, bias, other, acc, place, column, here, inside, EPILOGUE: tl.constexpr):
    """Bias, epilogue, one rounding, store."""
    value = acc
    if bias is not None:
        value = value + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    second = value
    if other is not None:
        second = tl.load(other + place, mask=here, other=0.0).to(tl.float32)
    tl.store(y + place, EPILOGUE(value, second).to(y.dtype.element_ty), mask=here)


@triton.jit
def gated(
    y,
    x,
    w,
    bias,
    rows,
    ACTIVATION: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y [rows, N], x [rows, K], w [2 N, K], bias [2 N]."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    live = row < rows
    inside = column < N
    gate, up = gate_and_up(x + row * K, w + column * K, live, inside, N, K, BM, BN, BK)
    if bias is not None:
        gate += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + N + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    out = (ACTIVATION(gate) * up).to(y.dtype.element_ty)
    place = row[:, None] * N + column[None, :]
    tl.store(y + place, out, mask=live[:, None] & inside[None, :])


@triton.jit
def gate_and_up(
    x,
    w,
    live,
    inside,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Both products of a gated FFN over one pass of x: w [BN] points to gate rows, up is N rows on."""
    k = tl.arange(0, BK)
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        at = k0 + k
        if K % BK == 0:
            taken = live[:, None]
            read = inside[None, :]
        else:
            taken = live[:, None] & (at < K)[None, :]
            read = inside[None, :] & (at < K)[:, None]
        a = tl.load(x[:, None] + at[None, :], mask=taken, other=0.0)
        g = tl.load(w[None, :] + at[:, None], mask=read, other=0.0)
        u = tl.load(w[None, :] + N * K + at[:, None], mask=read, other=0.0)
        gate = tl.dot(a, g, gate, input_precision="ieee")
        up = tl.dot(a, u, up, input_precision="ieee")
    return gate, up


def launches(
    *,
    rows: Expression,
    n: int,
    k: int,
    dtype: str,
    arch: int,
    bias: bool = False,
    other: str | None = None,
    epilogue: str | None = None,
    out_dtype: str | None = None,
    tiles: Tiles | None = None,
    smaller: int = 0,
) -> Lowering:
    """y [rows, n] = epilogue(x [rows, k] w [n, k]^T + bias, other [rows, n]).

    Operands y, x, w, bias, other (of the dtype that it names).  `epilogue` names a device function
    ("module:function"); the default adds `other` where there is one.  y may have another dtype than x
    and w.
    """
    tiles = shrunk(tiles or linear_tiles(n, k, dtype, arch), smaller)
    function = epilogue or f"{PACKAGE}.pointwise:{'add' if other else 'identity'}"
    split = tiles.splits > 1
    out = out_dtype or dtype
    name = f"linear_n{n}k{k}{_suffix(function)}{'_bias' if bias else ''}_{dtype}"
    arguments: list[Argument] = [
        operand("y", out),
        operand("x", dtype),
        operand("w", dtype),
        operand("bias", dtype, bias),
        operand("other", other or out, other is not None),
        temporary("partial", "f32", split),
        temporary("ticket", "i32", split),
        count("rows", rows),
    ]
    columns = cdiv(n, tiles.columns)
    constants: dict[str, ConstantValue] = {"EPILOGUE": function, "N": n, "K": k}
    step = assemble(
        name if out == dtype else f"{name}_to_{out}",
        "linear:linear",
        arguments,
        {
            **constants,
            "SPLITS": tiles.splits,
            "BM": tiles.rows,
            "BN": tiles.columns,
            "BK": tiles.depth,
        },
        Shape(({"cdiv": [rows, tiles.rows]}, columns, tiles.splits), tiles.warps, tiles.stages),
    )
    if not split:
        return Lowering((step,))
    return Lowering(
        (step,),
        (
            Scratch("partial", "f32", {"mul": [rows, tiles.splits * n]}),
            Scratch("ticket", "i32", {"mul": [{"cdiv": [rows, tiles.rows]}, columns]}, zeroed=True),
        ),
    )


def _suffix(function: str) -> str:
    short = function.partition(":")[2].removesuffix("_epilogue")
    return "" if short == "identity" else f"_{short}"


def gated_launches(
    *,
    rows: Expression,
    n: int,
    k: int,
    dtype: str,
    arch: int,
    activation: str = "silu",
    bias: bool = False,
    tiles: Tiles | None = None,
    smaller: int = 0,
) -> Lowering:
    """y [rows, n] = act(gate) * up with (gate, up) = x [rows, k] w [2 n, k]^T + bias [2 n].

    Operands y, x, w, bias: a linear whose only reader is silu_mul of its two halves.
    """
    tiles = shrunk(tiles or gated_tiles(n, k, dtype, arch), smaller)
    step = assemble(
        f"linear_{activation}_mul_n{n}k{k}{'_bias' if bias else ''}_{dtype}",
        "linear:gated",
        [
            operand("y", dtype),
            operand("x", dtype),
            operand("w", dtype),
            operand("bias", dtype, bias),
            count("rows", rows),
        ],
        {
            "ACTIVATION": f"{PACKAGE}.pointwise:{activation}",
            **{"N": n, "K": k, "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth},
        },
        Shape(({"cdiv": [rows, tiles.rows]}, cdiv(n, tiles.columns), 1), tiles.warps, tiles.stages),
    )
    return Lowering((step,))
