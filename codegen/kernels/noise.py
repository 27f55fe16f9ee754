"""Gumbel noise that is a hash of request, iteration, position and token (docs/formats.md): no state.

All integers are 32-bit and unsigned, and wrap around.  -ln U is computed from U below one half and
from 1 - U above, which is exact there, where float32 has too few bits for U itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """An integer hash (lowbias32) on uint32."""
    x = x ^ (x >> 16)
    x = tl.mul(x, 0x7FEB352D, sanitize_overflow=False)
    x = x ^ (x >> 15)
    x = tl.mul(x, 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, tick, pos):
    """The key of a row, uint32, of its request's seed, its iteration and its position, all int64."""
    key = mix(seed.to(tl.uint32) ^ mix((seed >> 32).to(tl.uint32)))
    key = mix(key ^ tick.to(tl.uint32))
    turned = tl.mul(pos.to(tl.uint32), 0x9E3779B9, sanitize_overflow=False)
    return mix(tl.add(key, turned, sanitize_overflow=False))


@triton.jit
def gumbel(key, token):
    """-ln(-ln U), U = ((u >> 8) + 0.5) 2^-24, u the hash of key (uint32) and token (int32)."""
    turned = tl.mul(token.to(tl.uint32), 0x85EBCA6B, sanitize_overflow=False)
    h = (mix(tl.add(key, turned, sanitize_overflow=False)) >> 8).to(tl.int32)
    low = (h.to(tl.float32) + 0.5) * 5.9604644775390625e-08
    rest = ((16777215 - h).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    # -ln(1 - v) = 2 artanh(s), s = v / (2 - v) <= 1/3: a series, for hardware logarithms near one
    # have an absolute error and here the relative one counts.
    v = tl.minimum(rest, 0.5)
    s = v / (2.0 - v)
    q = s * s
    series = 1.0 + q * (
        1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13)))))
    )
    exponential = tl.where(h < 8388608, -tl.log(tl.minimum(low, 0.5)), 2.0 * s * series)
    return -tl.log(exponential)
