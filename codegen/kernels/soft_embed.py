"""Iteration smoothing's mixture of embeddings: y[r] = weight[r] softmax(x[r] W^T (+ b)) table, live rows only.

* `soften`: logits of a tile of rows and a run of the vocabulary, rounded to x's dtype as stored ones are,
  with the peak and the sum of exp(z - peak) of each run.
* `mix`: p = exp(z - peak) of all runs, times the table's rows; the vocabulary is split between programs, the
  last of which adds the parts in their order and divides.

The mixture is as wide as a row of the table, too wide to be held beside a tile of logits, so they go through
scratch: 2 V bytes a row in bfloat16, a fiftieth of what the weights are for 32 rows.  NaN counts as minus
infinity; a row without a finite greatest logit gets 0.  A tile of rows of which none is live reads no weights.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from dcompile.codegen.kernels.dot import arrives_last, rows_by_rows
from dcompile.codegen.triton.assemble import Shape, assemble, cdiv, count, operand, temporary
from dcompile.codegen.triton.tiles import Tiles, mixture_tiles, shrunk, vocab_tiles
from dcompile.codegen.triton.variant import Expression, Lowering, Scratch


@triton.jit
def soften(
    logits,
    peaks,
    sums,
    x,
    w,
    bias,
    live,
    rows,
    V: tl.constexpr,
    D: tl.constexpr,
    RUN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """logits [rows, V], peaks, sums f32 [runs, rows], x [rows, D], w [V, D], bias [V], live bool [rows].

    A run is RUN tiles of BN tokens; rows that are not live are left out.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    run = tl.program_id(1)
    on = tl.load(live + row, mask=row < rows, other=0).to(tl.int32) != 0
    if tl.max(on.to(tl.int32), 0) > 0:
        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        at = row.to(tl.int64) * V
        for tile in range(run * RUN, tl.minimum((run + 1) * RUN, (V + BN - 1) // BN)):
            v = tile * BN + tl.arange(0, BN)
            inside = v < V
            z = rows_by_rows(x + row * D, w + v.to(tl.int64) * D, on, inside, 0, D, D, BM, BN, BK)
            if bias is not None:
                z += tl.load(bias + v, mask=inside, other=0.0).to(tl.float32)[None, :]
            rounded = z.to(x.dtype.element_ty)
            here = on[:, None] & inside[None, :]
            tl.store(logits + at[:, None] + v[None, :], rounded, mask=here)
            z = rounded.to(tl.float32)
            z = tl.where(inside[None, :] & (z == z), z, float("-inf"))
            higher = tl.maximum(peak, tl.max(z, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)
            peak = higher
        tl.store(peaks + run * rows + row, peak, mask=on)
        tl.store(sums + run * rows + row, total, mask=on)


@triton.jit
def whole(peaks, sums, row, on, rows, RUNS: tl.constexpr):
    """(peak, sum) of a softmax over all runs, f32 [BM] each; sum 0 where there is no finite peak."""
    peak = tl.load(peaks + row, mask=on, other=float("-inf"))
    for run in range(1, RUNS):
        found = tl.load(peaks + run * rows + row, mask=on, other=float("-inf"))
        peak = tl.maximum(peak, found)
    sound = (peak > float("-inf")) & (peak < float("inf"))
    peak = tl.where(sound, peak, 0.0)
    total = tl.zeros_like(peak)
    for run in range(RUNS):
        at = run * rows + row
        factor = tl.exp(tl.load(peaks + at, mask=on, other=float("-inf")) - peak)
        part = tl.load(sums + at, mask=on, other=0.0) * factor
        total += tl.where(sound, part, 0.0)
    return peak, total


@triton.jit
def mix(
    y,
    logits,
    table,
    live,
    weight,
    peaks,
    sums,
    partial,
    ticket,
    rows,
    V: tl.constexpr,
    N: tl.constexpr,
    RUNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y [rows, N], logits [rows, V], table [V, N] (rows beyond V are not read), weight f32 [rows].

    partial f32 [SPLITS, rows, N]; ticket i32 [tiles of rows, tiles of columns].
    """
    SPAN: tl.constexpr = (V + BK * SPLITS - 1) // (BK * SPLITS) * BK
    tile, split = tl.program_id(0), tl.program_id(2)
    row = tile * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < N
    on = tl.load(live + row, mask=row < rows, other=0).to(tl.int32) != 0
    here = (row < rows)[:, None] & inside[None, :]
    place = row[:, None] * N + column[None, :]
    if tl.max(on.to(tl.int32), 0) > 0:
        peak, total = whole(peaks, sums, row, on, rows, RUNS)
        at = row.to(tl.int64) * V
        k = tl.arange(0, BK)
        acc = tl.zeros([BM, BN], tl.float32)
        for v0 in range(split * SPAN, tl.minimum((split + 1) * SPAN, V), BK):
            v = v0 + k
            if V % BK == 0:
                z = tl.load(
                    logits + at[:, None] + v[None, :], mask=on[:, None], other=float("-inf")
                )
                e = tl.load(
                    table + v.to(tl.int64)[:, None] * N + column[None, :],
                    mask=inside[None, :],
                    other=0.0,
                )
            else:
                z = tl.load(
                    logits + at[:, None] + v[None, :],
                    mask=on[:, None] & (v < V)[None, :],
                    other=float("-inf"),
                )
                e = tl.load(
                    table + v.to(tl.int64)[:, None] * N + column[None, :],
                    mask=(v < V)[:, None] & inside[None, :],
                    other=0.0,
                )
            z = z.to(tl.float32)
            z = tl.where(z == z, z, float("-inf"))
            p = tl.where((total > 0.0)[:, None], tl.exp(z - peak[:, None]), 0.0)
            acc = tl.dot(p.to(e.dtype), e, acc, input_precision="ieee")
        tl.store(partial + split * rows * N + place, acc, mask=here)
        if arrives_last(ticket + tile * tl.num_programs(1) + tl.program_id(1), SPLITS):
            mixed = tl.zeros([BM, BN], tl.float32)
            for other in range(SPLITS):
                part = partial + other * rows * N + place
                mixed += tl.load(part, mask=here, other=0.0, cache_modifier=".cg")
            by = tl.load(weight + row, mask=on, other=0.0)
            by = tl.where(on & (total > 0.0), by / total, 0.0)
            mixed = tl.where((by != 0.0)[:, None], mixed * by[:, None], 0.0)
            tl.store(y + place, mixed.to(y.dtype.element_ty), mask=here)
    else:
        if split == 0:
            nothing = tl.zeros([BM, BN], tl.float32)
            tl.store(y + place, nothing.to(y.dtype.element_ty), mask=here)


def launches(
    *,
    rows: Expression,
    vocab: int,
    hidden: int,
    width: int,
    dtype: str,
    arch: int,
    bias: bool = False,
    tiles: Tiles | None = None,
    mixture: Tiles | None = None,
    smaller: int = 0,
) -> Lowering:
    """Operands y [rows, width], x [rows, hidden], w [vocab, hidden], bias [vocab], table [at least
    vocab, width], live bool, weight f32 [rows].
    """
    # Beside the rows' places in the stored logits a wider tile does not fit the registers of sm_90.
    tiles = tiles or replace(vocab_tiles(vocab, hidden, dtype, arch), columns=32)
    tiles = shrunk(tiles, smaller)
    mixture = shrunk(mixture or mixture_tiles(width, vocab, dtype, arch), smaller)
    run = cdiv(cdiv(vocab, tiles.columns), tiles.splits)
    runs = cdiv(cdiv(vocab, tiles.columns), run)
    row_tiles: Expression = {"cdiv": [rows, mixture.rows]}
    columns = cdiv(width, mixture.columns)
    found = [temporary("peaks", "f32"), temporary("sums", "f32")]
    first = assemble(
        f"soft_embed_logits_v{vocab}d{hidden}{'_bias' if bias else ''}_{dtype}",
        "soft_embed:soften",
        [
            temporary("logits", dtype),
            *found,
            operand("x", dtype),
            operand("w", dtype),
            operand("bias", dtype, bias),
            operand("live", "bool"),
            count("rows", rows),
        ],
        {
            **{"V": vocab, "D": hidden, "RUN": run},
            **{"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth},
        },
        Shape(({"cdiv": [rows, tiles.rows]}, runs, 1), tiles.warps, tiles.stages),
    )
    second = assemble(
        f"soft_embed_mix_v{vocab}d{width}_{dtype}",
        "soft_embed:mix",
        [
            operand("y", dtype),
            temporary("logits", dtype),
            operand("table", dtype),
            operand("live", "bool"),
            operand("weight", "f32"),
            *found,
            temporary("partial", "f32"),
            temporary("ticket", "i32"),
            count("rows", rows),
        ],
        {
            **{"V": vocab, "N": width, "RUNS": runs, "SPLITS": mixture.splits},
            **{"BM": mixture.rows, "BN": mixture.columns, "BK": mixture.depth},
        },
        Shape((row_tiles, columns, mixture.splits), mixture.warps, mixture.stages),
    )
    scratch = (
        Scratch("logits", dtype, {"mul": [rows, vocab]}),  # type: ignore[arg-type]
        Scratch("peaks", "f32", {"mul": [rows, runs]}),
        Scratch("sums", "f32", {"mul": [rows, runs]}),
        Scratch("partial", "f32", {"mul": [rows, mixture.splits * width]}),
        Scratch("ticket", "i32", {"mul": [row_tiles, columns]}, zeroed=True),
    )
    return Lowering((first, second), scratch)
