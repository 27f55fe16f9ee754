"""Products of a few rows with streamed weights, and the hand-over between programs that share one.

These device functions are what linear, moe_ffn and vocab_choice have in common.  A row's sum has one
order, which depends on the tile's depth and on nothing else, so rows are invariant of each other.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_by_rows(
    x,
    w,
    live,
    inside,
    start,
    end,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """acc[i, j] = sum of x[i][k] w[j][k] over start <= k < end, float32 [BM, BN].

    x [BM] and w [BN] point to rows of length K; rows outside `live` and `inside` count as zero.
    Products are in w's dtype, which may be wider than x's.
    """
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(start, end, BK):
        at = k0 + k
        if K % BK == 0:
            a = tl.load(x[:, None] + at[None, :], mask=live[:, None], other=0.0)
            b = tl.load(w[None, :] + at[:, None], mask=inside[None, :], other=0.0)
        else:
            within = at < K
            a = tl.load(x[:, None] + at[None, :], mask=live[:, None] & within[None, :], other=0.0)
            b = tl.load(w[None, :] + at[:, None], mask=inside[None, :] & within[:, None], other=0.0)
        acc = tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")
    return acc


@triton.jit
def arrives_last(ticket, expected):
    """True in the last of `expected` programs to come here, which then sees what all had stored.

    The ticket is zero again afterwards.  The barrier before the atomic orders the whole program's
    stores before it, the one behind it the whole program's loads after it (PTX memory model, 8.10).
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return last
