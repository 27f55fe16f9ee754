"""The interpreter's checks: planted bugs are reported, right kernels pass, bfloat16 is bfloat16."""

from __future__ import annotations

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from interpreter import OutOfBounds, Race

from dcompile.codegen.kernels.dot import arrives_last

assert interpreter


@triton.jit
def double(x, out, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - SHIFT) + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=(i < n) | (not MASKED), other=0.0)
    tl.store(out + i, value * 2, mask=i < n)


@triton.jit
def turn_round(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + (i + BLOCK) % n, mask=i < n, other=0.0)
    tl.store(x + i, value, mask=i < n)


@triton.jit
def add_up(x, partial, ticket, out, ORDERED: tl.constexpr):
    p = tl.program_id(0)
    tl.store(partial + p, tl.load(x + p))
    last = p == tl.num_programs(0) - 1
    if ORDERED:
        last = arrives_last(ticket, tl.num_programs(0))
    if last:
        total = 0.0
        for i in range(tl.num_programs(0)):
            total += tl.load(partial + i)
        tl.store(out, total)


@triton.jit
def overflow(out, n):
    tl.store(out, n * 65536)


@triton.jit
def bf16_product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    acc = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(out + at, acc.to(tl.bfloat16))


def test_a_right_kernel_passes() -> None:
    x, out = torch.randn(100), torch.empty(100)
    double[(4,)](x, out, 100, BLOCK=32, SHIFT=0, MASKED=True)
    assert torch.equal(out, x * 2)


def test_loads_outside_are_reported() -> None:
    x = torch.randn(4096)[:100]
    with pytest.raises(OutOfBounds):
        double[(4,)](x, torch.empty(100), 100, BLOCK=32, SHIFT=0, MASKED=False)


def test_two_writers_are_reported() -> None:
    with pytest.raises(Race):
        double[(4,)](torch.randn(100), torch.empty(100), 100, BLOCK=32, SHIFT=8, MASKED=True)


def test_writing_what_another_read_is_reported() -> None:
    with pytest.raises(Race):
        turn_round[(4,)](torch.randn(128), 128, BLOCK=32)


def test_only_an_atomic_orders_programs() -> None:
    x, out = torch.randn(5), torch.empty(1)
    partial, ticket = torch.empty(5), torch.zeros(1, dtype=torch.int32)
    add_up[(5,)](x, partial, ticket, out, ORDERED=True)
    assert abs(float(out - x.sum())) < 1e-5 and int(ticket) == 0
    with pytest.raises(Race):
        add_up[(5,)](x, partial, ticket, out, ORDERED=False)


def test_overflow_is_reported() -> None:
    with pytest.raises(Exception, match="overflow"):
        overflow[(1,)](torch.empty(1, dtype=torch.int64), 70000)


def test_bf16_products_round_once_to_nearest() -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty_like(a)
    bf16_product[(1,)](a, b, out, N=16)
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())
    assert torch.equal(torch.tensor([1.9999]).bfloat16().float(), torch.tensor([2.0]))
