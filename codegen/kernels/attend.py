"""Attention of any rows over cached keys: row r sees the first row_limit[r] keys of slot row_seq[r].

o[r, h] = sum_j softmax_j(scale q[r, h] k[j, g])  v[j, g],  g = h // (H / G),  j < row_limit[r]

A program takes a tile of rows, one key head and one run of CHUNK keys; the heads that share the key
head lie beside each other in the tile, so keys and values are read once for all of them.  The softmax
is online (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).  Runs are
merged in their order by the last program of a tile to arrive (Flash-Decoding's split over keys).

A row's numbers do not depend on the rows beside it: where the tile goes on for the sake of another
row, or another slot, a row's weights are zero and its factor is one, both exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.kernels.dot import arrives_last
from dcompile.codegen.triton.assemble import (
    Shape,
    assemble,
    cdiv,
    count,
    operand,
    power_of_two,
    temporary,
)
from dcompile.codegen.triton.tiles import Tiles, attend_tiles, shrunk
from dcompile.codegen.triton.variant import Expression, Lowering, Scratch

LOG2E = 1.4426950408889634


@triton.jit
def attend(
    o,
    q,
    keys,
    values,
    row_seq,
    row_limit,
    chosen,
    partial,
    peaks,
    sums,
    ticket,
    rows,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    L: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """o, q [rows, H, SIZE], keys, values [N, L, G, SIZE], row_seq, row_limit i64 [rows].

    With chosen i64 [rows], row i of o is of row chosen[i] of q, row_seq and row_limit.

    partial f32 [CHUNKS, rows, H, SIZE], peaks and sums f32 [CHUNKS, rows, H], where CHUNKS > 1.
    """
    SHARED: tl.constexpr = H // G
    TILE: tl.constexpr = BM // SHARED  # rows of a tile
    chunk = tl.program_id(2)
    group = tl.program_id(1)
    first = tl.program_id(0) * TILE
    m = tl.arange(0, BM)
    row = first + m // SHARED
    live = (m < TILE * SHARED) & (row < rows)
    source = row
    if chosen is not None:
        source = tl.load(chosen + row, mask=live, other=0).to(tl.int32)
    limit = tl.load(row_limit + source, mask=live, other=0).to(tl.int32)
    start = chunk * CHUNK
    longest = tl.max(limit, 0)
    if start < longest:
        seq = tl.load(row_seq + source, mask=live, other=0).to(tl.int32)
        head = row * H + group * SHARED + m % SHARED
        d = tl.arange(0, BD)
        place = head[:, None] * SIZE + d[None, :]
        here = live[:, None] & (d < SIZE)[None, :]
        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)
        asking = place + ((source - row) * (H * SIZE))[:, None]
        queries = tl.load(q + asking, mask=here, other=0.0)
        # Slots of the tile in ascending order; nearly always there is one.
        slot = tl.min(tl.where(live, seq, 2147483647), 0)
        while slot < 2147483647:
            mine = live & (seq == slot)
            seen = tl.where(mine, limit, 0)
            end = tl.minimum(start + CHUNK, tl.max(seen, 0))
            base = slot.to(tl.int64) * (L * G * SIZE) + group * SIZE
            peak, total, acc = over_keys(
                queries,
                keys + base,
                values + base,
                seen,
                start,
                end,
                peak,
                total,
                acc,
                SCALE,
                G * SIZE,
                SIZE,
                BM,
                BN,
                BD,
            )
            slot = tl.min(tl.where(live & (seq > slot), seq, 2147483647), 0)
        if CHUNKS == 1:
            write(o + place, acc, total, here)
        else:
            taking_part = tl.minimum((longest + CHUNK - 1) // CHUNK, CHUNKS)
            at = chunk * rows * H
            tl.store(partial + at.to(tl.int64) * SIZE + place, acc, mask=here)
            tl.store(peaks + at + head, peak, mask=live)
            tl.store(sums + at + head, total, mask=live)
            tile = tl.program_id(0) * G + group
            if arrives_last(ticket + tile, taking_part):
                merged, length = merge(
                    partial,
                    peaks,
                    sums,
                    place,
                    here,
                    head,
                    live,
                    taking_part,
                    rows,
                    H,
                    SIZE,
                    BM,
                    BD,
                )
                write(o + place, merged, length, here)


@triton.jit
def merge(
    partial,
    peaks,
    sums,
    place,
    here,
    head,
    live,
    taking_part,
    rows,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """The runs of a tile, in their order: (weighted values, sum of weights) under one peak."""
    top = tl.full([BM], float("-inf"), tl.float32)
    for c in range(taking_part):
        at = peaks + c * rows * H + head
        top = tl.maximum(top, tl.load(at, mask=live, other=float("-inf"), cache_modifier=".cg"))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for c in range(taking_part):
        run = c * rows * H
        peak = tl.load(peaks + run + head, mask=live, other=float("-inf"), cache_modifier=".cg")
        factor = tl.exp2(peak - safe)
        total += tl.load(sums + run + head, mask=live, other=0.0, cache_modifier=".cg") * factor
        values = partial + run.to(tl.int64) * SIZE + place
        acc += tl.load(values, mask=here, other=0.0, cache_modifier=".cg") * factor[:, None]
    return acc, total


@triton.jit
def over_keys(
    queries,
    keys,
    values,
    seen,
    start,
    end,
    peak,
    total,
    acc,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """The online softmax over keys start <= j < end of one slot; vector m sees those below seen[m]."""
    d = tl.arange(0, BD)
    for n0 in range(start, end, BN):
        j = n0 + tl.arange(0, BN)
        inside = j < end
        at = j.to(tl.int64) * STRIDE
        if SIZE == BD:
            read_k = inside[None, :]
            read_v = inside[:, None]
        else:
            read_k = inside[None, :] & (d < SIZE)[:, None]
            read_v = inside[:, None] & (d < SIZE)[None, :]
        k = tl.load(keys + at[None, :] + d[:, None], mask=read_k, other=0.0)
        score = tl.dot(queries, k, input_precision="ieee") * SCALE
        score = tl.where(j[None, :] < seen[:, None], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        # A vector that has seen nothing yet has no peak: minus infinity less itself is not a number.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - safe[:, None])
        factor = tl.where(higher == peak, 1.0, tl.exp2(peak - safe))
        total = total * factor + tl.sum(weight, 1)
        v = tl.load(values + at[:, None] + d[None, :], mask=read_v, other=0.0)
        acc = acc * factor[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        peak = higher
    return peak, total, acc


@triton.jit
def write(o, acc, total, here):
    """A row that may see no key at all gives zeros."""
    scale = 1.0 / tl.where(total > 0.0, total, 1.0)
    tl.store(o, (acc * scale[:, None]).to(o.dtype.element_ty), mask=here)


def launches(
    *,
    rows: Expression,
    heads: int,
    groups: int,
    size: int,
    positions: int,
    dtype: str,
    scale: float,
    arch: int,
    window: int = 32,
    tiles: Tiles | None = None,
    chosen: bool = False,
    smaller: int = 0,
) -> Lowering:
    """Operands o, q [rows, heads, size], keys, values [N, positions, groups, size], row_seq, row_limit.

    With `chosen`, an operand of that name says which rows of q, row_seq and row_limit are taken.

    `window`: how many rows of one sequence usually run together; only speed depends on it.
    """
    shared = heads // groups
    tiles = tiles or attend_tiles(window, heads, groups, size, dtype, arch)
    # A tile has all heads of a group of at least one row; a run of keys stays.
    least = max(16, power_of_two(heads // groups))
    tiles = shrunk(tiles, smaller, least_rows=least, depth=False)
    block = max(tiles.rows, power_of_two(shared, 16))
    chunks = cdiv(positions, tiles.depth)
    split = chunks > 1
    row_tiles: Expression = {"cdiv": [rows, block // shared]}
    constants = {
        **{"SCALE": scale * LOG2E, "H": heads, "G": groups, "SIZE": size},
        **{"BD": power_of_two(size, 16), "L": positions, "CHUNK": tiles.depth, "CHUNKS": chunks},
        **{"BM": block, "BN": min(tiles.columns, tiles.depth)},
    }
    step = assemble(
        f"attend{'_chosen' if chosen else ''}_h{heads}g{groups}d{size}l{positions}_{dtype}",
        "attend:attend",
        [
            *(operand(name, dtype) for name in ("o", "q", "keys", "values")),
            operand("row_seq", "i64"),
            operand("row_limit", "i64"),
            operand("chosen", "i64", chosen),
            *(temporary(name, "f32", split) for name in ("partial", "peaks", "sums")),
            temporary("ticket", "i32", split),
            count("rows", rows),
        ],
        constants,
        Shape((row_tiles, groups, chunks), tiles.warps, tiles.stages),
    )
    if not split:
        return Lowering((step,))
    vectors: Expression = {"mul": [rows, chunks * heads]}
    return Lowering(
        (step,),
        (
            Scratch("partial", "f32", {"mul": [rows, chunks * heads * size]}),
            Scratch("peaks", "f32", vectors),
            Scratch("sums", "f32", vectors),
            Scratch("ticket", "i32", {"mul": [row_tiles, groups]}, zeroed=True),
        ),
    )
