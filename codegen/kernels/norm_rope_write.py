"""Per-head RMS norm of q and k, rotary embedding, and keys and values written at their places.

A head h of a row at position p becomes, over its first `rot` dimensions in two halves a and b,
(a cos1 - b sin1, b cos2 + a sin2) with the tables' row p (RoFormer, arXiv 2104.09864, half split);
the other dimensions pass through.  Keys are stored after the rotation, so a cache is read as it is.

A program takes one row and HEADS heads of one kind: first the query programs, then keys, then values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.triton.assemble import Shape, assemble, cdiv, operand, power_of_two
from dcompile.codegen.triton.variant import Expression, Lowering


@triton.jit
def turn(
    out,
    x,
    norm,
    cos,
    sin,
    live,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    ROT: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Norm (where given) and rotation of heads; out, x [HEADS] point to heads, cos and sin to a row."""
    i = tl.arange(0, HALF)
    inside = i < ROT // 2
    here = live[:, None] & inside[None, :]
    a = tl.load(x[:, None] + i[None, :], mask=here, other=0.0).to(tl.float32)
    b = tl.load(x[:, None] + (ROT // 2 + i)[None, :], mask=here, other=0.0).to(tl.float32)
    j = tl.arange(0, TAIL)
    behind = live[:, None] & (j < SIZE - ROT)[None, :]
    if norm is not None:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if ROT < SIZE:
            rest = tl.load(x[:, None] + (ROT + j)[None, :], mask=behind, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, 1)
        inverse = 1.0 / tl.sqrt_rn(squares / SIZE + EPS)
        wa = tl.load(norm + i, mask=inside, other=0.0).to(tl.float32)
        wb = tl.load(norm + ROT // 2 + i, mask=inside, other=0.0).to(tl.float32)
        a = a * inverse[:, None] * wa[None, :]
        b = b * inverse[:, None] * wb[None, :]
    cos_a = tl.load(cos + i, mask=inside, other=0.0)[None, :]
    sin_a = tl.load(sin + i, mask=inside, other=0.0)[None, :]
    cos_b = tl.load(cos + ROT // 2 + i, mask=inside, other=0.0)[None, :]
    sin_b = tl.load(sin + ROT // 2 + i, mask=inside, other=0.0)[None, :]
    kind = out.dtype.element_ty
    tl.store(out[:, None] + i[None, :], (a * cos_a - b * sin_a).to(kind), mask=here)
    tl.store(out[:, None] + (ROT // 2 + i)[None, :], (b * cos_b + a * sin_b).to(kind), mask=here)
    if ROT < SIZE:
        tail = tl.load(x[:, None] + (ROT + j)[None, :], mask=behind, other=0.0).to(tl.float32)
        if norm is not None:
            wt = tl.load(norm + ROT + j, mask=j < SIZE - ROT, other=0.0).to(tl.float32)
            tail = tail * inverse[:, None] * wt[None, :]
        tl.store(out[:, None] + (ROT + j)[None, :], tail.to(kind), mask=behind)


@triton.jit
def norm_rope_write(
    q,
    keys,
    values,
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    row_seq,
    row_pos,
    EPS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    SIZE: tl.constexpr,
    L: tl.constexpr,
    ROT: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """q [R, H, SIZE], keys, values [N, L, G, SIZE], qkv [R, (H + 2 G) SIZE], cos, sin [L, ROT]."""
    QUERIES: tl.constexpr = (H + HEADS - 1) // HEADS
    GROUPS: tl.constexpr = (G + HEADS - 1) // HEADS
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pos = tl.load(row_pos + row)
    source = qkv + row * (H + 2 * G) * SIZE
    at = pos * ROT
    slot = (tl.load(row_seq + row) * L + pos) * G * SIZE
    if part < QUERIES:
        head = part * HEADS + tl.arange(0, HEADS)
        out = q + (row * H + head) * SIZE
        x = source + head * SIZE
        turn(out, x, q_norm, cos + at, sin + at, head < H, EPS, SIZE, ROT, HALF, TAIL)
    elif part < QUERIES + GROUPS:
        group = (part - QUERIES) * HEADS + tl.arange(0, HEADS)
        place = keys + slot + group * SIZE
        k = source + (H + group) * SIZE
        turn(place, k, k_norm, cos + at, sin + at, group < G, EPS, SIZE, ROT, HALF, TAIL)
    else:
        value = (part - QUERIES - GROUPS) * HEADS + tl.arange(0, HEADS)
        d = tl.arange(0, WHOLE)
        mask = (value < G)[:, None] & (d < SIZE)[None, :]
        offset = value[:, None] * SIZE + d[None, :]
        copied = tl.load(source + (H + G) * SIZE + offset, mask=mask, other=0.0)
        tl.store(values + slot + offset, copied, mask=mask)


def launches(
    *,
    rows: Expression,
    heads: int,
    groups: int,
    size: int,
    positions: int,
    rot: int,
    dtype: str,
    eps: float,
    q_norm: bool = True,
    k_norm: bool = True,
) -> Lowering:
    """Operands q, keys, values, qkv, q_norm, k_norm, cos, sin, row_seq, row_pos (docs/formats.md)."""
    together = min(4, power_of_two(groups))
    parts = cdiv(heads, together) + 2 * cdiv(groups, together)
    norms = f"{'q' if q_norm else ''}{'k' if k_norm else ''}norm_" if q_norm or k_norm else ""
    constants = {
        **{"EPS": eps, "H": heads, "G": groups, "SIZE": size, "L": positions, "ROT": rot},
        **{"HALF": power_of_two(rot // 2), "TAIL": power_of_two(max(1, size - rot))},
        **{"WHOLE": power_of_two(size), "HEADS": together},
    }
    step = assemble(
        f"{norms}rope_write_h{heads}g{groups}d{size}r{rot}_{dtype}",
        "norm_rope_write:norm_rope_write",
        [
            operand("q", dtype),
            operand("keys", dtype),
            operand("values", dtype),
            operand("qkv", dtype),
            operand("q_norm", dtype, q_norm),
            operand("k_norm", dtype, k_norm),
            operand("cos", "f32"),
            operand("sin", "f32"),
            operand("row_seq", "i64"),
            operand("row_pos", "i64"),
        ],
        constants,
        Shape((rows, parts, 1), warps=1),
    )
    return Lowering((step,))
