"""The choice of tokens from the vocabulary projection, without a logit ever being stored.

z = x W^T (+ b), rounded to x's dtype as stored logits would be; NaN counts as minus infinity.
p = softmax(z) over the whole vocabulary.  token = argmax of z without the mask id, the lowest id on a
tie; with a temperature t > 0 the argmax of z / t + Gumbel noise.  confidence = p[token]; margin = the
difference of the two largest p, mask id left out; entropy = -sum p ln p.

`choose_partly`: each program keeps, for a tile of rows and a run of the vocabulary, the online
softmax's peak and sum (arXiv 1805.02867), the sum of p-weighted logits, the two best, and the best
score with its token.  `choose_finally` merges the runs of a row.  Where tokens are asked about, `tell`
computes their logits once more: p, and the score by which the choice is made, z or z / t + noise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.kernels.dot import rows_by_rows
from dcompile.codegen.kernels.noise import gumbel, noise_key
from dcompile.codegen.triton.assemble import (
    Argument,
    Shape,
    assemble,
    cdiv,
    count,
    operand,
    power_of_two,
    temporary,
)
from dcompile.codegen.triton.tiles import Tiles, shrunk, vocab_tiles
from dcompile.codegen.triton.variant import Expression, Lowering, Scratch

FIELDS = 7  # peak, sum, weighted logits, best and second logit, best score, the logit that has it


@triton.jit
def choose_partly(
    x,
    w,
    bias,
    live,
    temperature,
    seed,
    tick,
    pos,
    found,
    tokens,
    rows,
    V: tl.constexpr,
    D: tl.constexpr,
    LENGTH: tl.constexpr,
    MASK: tl.constexpr,
    RUN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x [rows, D], w [V, D], bias [V], live bool [rows], temperature, seed, tick [rows / LENGTH].

    found f32 [7, runs, rows], tokens i32 [runs, rows]; a run is RUN tiles of BN tokens.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    run = tl.program_id(1)
    on = tl.load(live + row, mask=row < rows, other=0).to(tl.int32) != 0
    if tl.sum(on.to(tl.int32), 0) > 0:
        sequence = row // LENGTH
        t = tl.load(temperature + sequence, mask=on, other=0.0)
        key = noise_key(
            tl.load(seed + sequence, mask=on, other=0),
            tl.load(tick + sequence, mask=on, other=0),
            tl.load(pos + row, mask=on, other=0),
        )
        sampled = tl.max(t, 0) > 0.0
        nothing = tl.full([BM], float("-inf"), tl.float32)
        peak, total, weighted = nothing, tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        best, second, score, logit = nothing, nothing, nothing, nothing
        token = tl.full([BM], 2147483647, tl.int32)
        for tile in range(run * RUN, tl.minimum((run + 1) * RUN, (V + BN - 1) // BN)):
            v = tile * BN + tl.arange(0, BN)
            inside = v < V
            z = rows_by_rows(x + row * D, w + v.to(tl.int64) * D, on, inside, 0, D, D, BM, BN, BK)
            if bias is not None:
                z += tl.load(bias + v, mask=inside, other=0.0).to(tl.float32)[None, :]
            z = z.to(x.dtype.element_ty).to(tl.float32)
            z = tl.where(inside[None, :] & (z == z), z, float("-inf"))
            peak, total, weighted = spread(z, peak, total, weighted)
            allowed = (inside & (v != MASK))[None, :]
            clean = tl.where(allowed, z, float("-inf"))
            here = tl.max(clean, 1)
            first = lowest(allowed & (clean == here[:, None]), v)
            rest = tl.max(tl.where(v[None, :] == first[:, None], float("-inf"), clean), 1)
            second = tl.maximum(tl.minimum(best, here), tl.maximum(second, rest))
            best = tl.maximum(best, here)
            if sampled:
                noise = gumbel(key[:, None], v[None, :])
                noisy = clean / tl.where(t > 0.0, t, 1.0)[:, None] + noise
                tried = tl.where((t > 0.0)[:, None], noisy, clean)
                tried = tl.where(allowed, tl.maximum(tried, -3.4028234663852886e38), float("-inf"))
                tile_score = tl.max(tried, 1)
                tile_token = lowest(allowed & (tried == tile_score[:, None]), v)
                tile_logit = tl.sum(tl.where(v[None, :] == tile_token[:, None], z, 0.0), 1)
            else:
                # The first other id stands in where every logit is minus infinity.
                floored = tl.maximum(here, -3.4028234663852886e38)
                tile_score = tl.where(first == 2147483647, float("-inf"), floored)
                tile_token = first
                tile_logit = here
            better = tile_score > score
            token = tl.where(better, tile_token, token)
            logit = tl.where(better, tile_logit, logit)
            score = tl.where(better, tile_score, score)
        at = found + run * rows + row
        step = tl.num_programs(1) * rows
        tl.store(at, peak, mask=on)
        tl.store(at + step, total, mask=on)
        tl.store(at + 2 * step, weighted, mask=on)
        tl.store(at + 3 * step, best, mask=on)
        tl.store(at + 4 * step, second, mask=on)
        tl.store(at + 5 * step, score, mask=on)
        tl.store(at + 6 * step, logit, mask=on)
        tl.store(tokens + run * rows + row, token, mask=on)


@triton.jit
def lowest(those, v):
    """The lowest id of each row's set, 2^31 - 1 where it is empty."""
    return tl.min(tl.where(those, v[None, :], 2147483647), 1)


@triton.jit
def spread(z, peak, total, weighted):
    """Online sums of exp(z - peak) and of exp(z - peak) (z - peak) over one more tile."""
    higher = tl.maximum(peak, tl.max(z, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shift = tl.where(peak == float("-inf"), 0.0, peak - safe)
    factor = tl.where(peak == float("-inf"), 0.0, tl.exp(shift))
    below = z - safe[:, None]
    p = tl.exp(below)
    moved = factor * (weighted + total * shift)
    weighted = moved + tl.sum(tl.where(p > 0.0, p * below, 0.0), 1)
    return higher, total * factor + tl.sum(p, 1), weighted


@triton.jit
def choose_finally(
    token,
    confidence,
    margin,
    entropy,
    choice_score,
    whole,
    live,
    found,
    tokens,
    rows,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """token i64, confidence, margin, entropy f32 [rows]; a row that is not live gets -1, -inf, -inf, 0.

    choice_score f32 [rows] and whole f32 [2, rows], peak and sum of the softmax, are for `tell`.
    """
    row = tl.program_id(0)
    if tl.load(live + row).to(tl.int32) != 0:
        run = tl.arange(0, BLOCK)
        real = run < RUNS
        at = found + run * rows + row
        step = RUNS * rows
        peaks = tl.load(at, mask=real, other=float("-inf"))
        sums = tl.load(at + step, mask=real, other=0.0)
        weighted = tl.load(at + 2 * step, mask=real, other=0.0)
        bests = tl.load(at + 3 * step, mask=real, other=float("-inf"))
        seconds = tl.load(at + 4 * step, mask=real, other=float("-inf"))
        scores = tl.load(at + 5 * step, mask=real, other=float("-inf"))
        logits = tl.load(at + 6 * step, mask=real, other=float("-inf"))
        names = tl.load(tokens + run * rows + row, mask=real, other=2147483647)
        peak = tl.max(peaks, 0)
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        shift = tl.where(peaks == float("-inf"), 0.0, peaks - safe)
        factor = tl.where(peaks == float("-inf"), 0.0, tl.exp(shift))
        total = tl.sum(sums * factor, 0)
        mean = tl.sum(factor * (weighted + sums * shift), 0) / total
        best = tl.max(bests, 0)
        holder = tl.min(tl.where(bests == best, run, BLOCK), 0)
        second = tl.maximum(
            tl.max(tl.where(run == holder, float("-inf"), bests), 0), tl.max(seconds, 0)
        )
        score = tl.max(scores, 0)
        chosen = tl.min(tl.where(scores == score, names, 2147483647), 0)
        logit = tl.max(tl.where(names == chosen, logits, float("-inf")), 0)
        tl.store(token + row, chosen.to(tl.int64))
        tl.store(confidence + row, tl.exp(logit - safe) / total)
        tl.store(margin + row, (tl.exp(best - safe) - tl.exp(second - safe)) / total)
        tl.store(entropy + row, tl.log(total) - mean)
        if choice_score is not None:
            tl.store(choice_score + row, score)
            tl.store(whole + row, safe)
            tl.store(whole + rows + row, total)
    else:
        tl.store(token + row, -1)
        tl.store(confidence + row, float("-inf"))
        tl.store(margin + row, float("-inf"))
        tl.store(entropy + row, 0.0)
        if choice_score is not None:
            tl.store(choice_score + row, float("-inf"))


@triton.jit
def tell(
    probability,
    score,
    x,
    w,
    bias,
    live,
    temperature,
    seed,
    tick,
    pos,
    asked,
    whole,
    rows,
    D: tl.constexpr,
    LENGTH: tl.constexpr,
    MASK: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
):
    """probability, score f32 [rows, S] of tokens asked i64 [rows, S]; 0 and -inf where a row is not live."""
    row = tl.program_id(0)
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    inside = s < S
    p = tl.zeros([BS], tl.float32)
    made = tl.full([BS], float("-inf"), tl.float32)
    if tl.load(live + row).to(tl.int32) != 0:
        token = tl.load(asked + row * S + s, mask=inside, other=0)
        k = tl.arange(0, BK)
        acc = tl.zeros([BS, BK], tl.float32)
        for k0 in range(0, D, BK):
            within = k0 + k < D
            a = tl.load(x + row * D + k0 + k, mask=within, other=0.0).to(tl.float32)
            at = w + token[:, None] * D + (k0 + k)[None, :]
            b = tl.load(at, mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)
            acc += a[None, :] * b
        z = tl.sum(acc, 1)
        if bias is not None:
            z += tl.load(bias + token, mask=inside, other=0.0).to(tl.float32)
        z = z.to(x.dtype.element_ty).to(tl.float32)
        z = tl.where(z == z, z, float("-inf"))
        sequence = row // LENGTH
        t = tl.load(temperature + sequence)
        key = noise_key(tl.load(seed + sequence), tl.load(tick + sequence), tl.load(pos + row))
        made = z
        if t > 0.0:
            made = z / t + gumbel(key, token.to(tl.int32))
        made = tl.where(token == MASK, float("-inf"), made)
        p = tl.exp(z - tl.load(whole + row)) / tl.load(whole + rows + row)
    tl.store(probability + row * S + s, p, mask=inside)
    tl.store(score + row * S + s, made, mask=inside)


def launches(
    *,
    sequences: Expression,
    length: int,
    hidden: int,
    vocab: int,
    mask_id: int,
    dtype: str,
    arch: int,
    bias: bool = False,
    tiles: Tiles | None = None,
    asked: int = 0,
    smaller: int = 0,
) -> Lowering:
    """Operands token i64, confidence, margin, entropy f32 [B, n], x [B, n, hidden], w [vocab, hidden], bias,
    live bool [B, n], temperature f32, seed, tick i64 [B], pos i64 [B, n]; B = sequences, n = length.

    With `asked` tokens a position also choice_score f32 [B, n], asked i64, probability, score f32 [B, n, S].
    """
    tiles = shrunk(tiles or vocab_tiles(vocab, hidden, dtype, arch), smaller)
    rows: Expression = {"mul": [sequences, length]}
    run = cdiv(cdiv(vocab, tiles.columns), tiles.splits)
    runs = cdiv(cdiv(vocab, tiles.columns), run)
    kept: list[Argument] = [temporary("found", "f32"), temporary("tokens", "i32")]
    request = [
        operand("live", "bool"),
        operand("temperature", "f32"),
        *(operand(name, "i64") for name in ("seed", "tick", "pos")),
    ]
    partly = assemble(
        f"vocab_choice_v{vocab}d{hidden}{'_bias' if bias else ''}_{dtype}",
        "vocab_choice:choose_partly",
        [
            operand("x", dtype),
            operand("w", dtype),
            operand("bias", dtype, bias),
            *request,
            *kept,
            count("rows", rows),
        ],
        {
            **{"V": vocab, "D": hidden, "LENGTH": length, "MASK": mask_id, "RUN": run},
            **{"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth},
        },
        Shape(({"cdiv": [rows, tiles.rows]}, runs, 1), tiles.warps, tiles.stages),
    )
    finally_ = assemble(
        f"vocab_choice_merge_s{runs}{'_asked' if asked else ''}",
        "vocab_choice:choose_finally",
        [
            operand("token", "i64"),
            *(operand(name, "f32") for name in ("confidence", "margin", "entropy")),
            operand("choice_score", "f32", asked > 0),
            temporary("whole", "f32", asked > 0),
            operand("live", "bool"),
            *kept,
            count("rows", rows),
        ],
        {"RUNS": runs, "BLOCK": power_of_two(runs, 32)},
        Shape((rows, 1, 1), warps=1, stages=1),
    )
    scratch = (
        Scratch("found", "f32", {"mul": [rows, FIELDS * runs]}),
        Scratch("tokens", "i32", {"mul": [rows, runs]}),
    )
    if not asked:
        return Lowering((partly, finally_), scratch)
    block = min(16, power_of_two(asked))
    told = assemble(
        f"vocab_choice_tell_d{hidden}s{asked}{'_bias' if bias else ''}_{dtype}",
        "vocab_choice:tell",
        [
            *(operand(name, "f32") for name in ("probability", "score")),
            operand("x", dtype),
            operand("w", dtype),
            operand("bias", dtype, bias),
            *request,
            operand("asked", "i64"),
            temporary("whole", "f32"),
            count("rows", rows),
        ],
        {
            **{"D": hidden, "LENGTH": length, "MASK": mask_id, "S": asked, "BS": block},
            "BK": min(128, power_of_two(hidden, 16)),
        },
        Shape((rows, cdiv(asked, block), 1)),
    )
    whole = Scratch("whole", "f32", {"mul": [rows, 2]})
    return Lowering((partly, finally_, told), (*scratch, whole))
