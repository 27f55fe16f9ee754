"""Device functions that other kernels take as constants: activations and epilogues.

An epilogue is `f(value, other) -> value` on float32 tiles; `other` is the tile of a second operand
at the same place, or the value itself where there is none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def relu(x):
    return tl.where(x > 0.0, x, tl.where(x == x, 0.0, x))  # NaN stays NaN


@triton.jit
def gelu(x):
    """x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(y)) with tanh(y) = 2 sigmoid(2 y) - 1, which cannot overflow."""
    y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * sigmoid(2.0 * y)


@triton.jit
def tanh(x):
    """2 sigmoid(2 x) - 1, where that does not cancel; near zero its series."""
    q = x * x
    series = x * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315))))
    return tl.where(tl.abs(x) < 0.125, series, 2.0 * sigmoid(2.0 * x) - 1.0)


@triton.jit
def power(x, y):
    """x^y as torch has it: 1 where y is 0, NaN for a negative x and a y that is no integer."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = tl.floor(y * 0.5) * 2.0 != y
    signed = tl.where(whole, tl.where(odd, -size, size), float("nan"))
    return tl.where(y == 0.0, 1.0, tl.where(x < 0.0, signed, size))


@triton.jit
def identity(value, other):
    return value


@triton.jit
def add(value, other):
    return value + other


@triton.jit
def silu_epilogue(value, other):
    return silu(value)
