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
def identity(value, other):
    return value


@triton.jit
def add(value, other):
    return value + other


@triton.jit
def silu_epilogue(value, other):
    return silu(value)
