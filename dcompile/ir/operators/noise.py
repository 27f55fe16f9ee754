"""Random numbers that depend on nothing but request, iteration, position and token."""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (lowbias32) on int64 values below 2^32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def _key(seed: Tensor, tick: Tensor, pos: Tensor) -> Tensor:
    high = (seed >> 32) & MASK32
    key = _mix((seed & MASK32) ^ _mix(high))
    key = _mix(key ^ (tick & MASK32))
    return _mix((key + pos * 0x9E3779B9) & MASK32)


def uniform(seed: Tensor, tick: Tensor, pos: Tensor) -> Tensor:
    """f32 in (0, 1) of the broadcast shape, by request, iteration and position; no token's noise."""
    return ((_mix(_key(seed, tick, pos) ^ 0x5BD1E995) >> 9).float() + 0.5) * 2.0**-23


def gumbel(seed: Tensor, tick: Tensor, pos: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise f32 [C, V] that depends on nothing but request, iteration, position, token."""
    key = _key(seed, tick, pos)
    token = torch.arange(vocab_size, device=pos.device)
    u = _mix((key[:, None] + token * 0x85EBCA6B) & MASK32)
    uniform = ((u >> 8).double() + 0.5) * 2.0**-24
    return (-torch.log(-torch.log(uniform))).float()
