"""The choice of tokens from the vocabulary projection."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_kernels import Choices, run_linear
from guards import TYPES, assert_close, few, rand
from hypothesis import given
from hypothesis import strategies as st
from native import Library


def mix(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def gumbel(seed: int, tick: int, pos: int, vocab: int) -> torch.Tensor:
    key = mix(torch.tensor((seed & 0xFFFFFFFF) ^ int(mix(torch.tensor((seed >> 32) & 0xFFFFFFFF)))))
    key = mix(key ^ (tick & 0xFFFFFFFF))
    key = mix((key + pos * 0x9E3779B9) & 0xFFFFFFFF)
    u = mix((key + torch.arange(vocab) * 0x85EBCA6B) & 0xFFFFFFFF)
    return -torch.log(-torch.log(((u >> 8).double() + 0.5) * 2.0**-24))


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("C, V, D", [(1, 2, 4), (6, 1000, 64), (40, 515, 33), (3, 256, 16)])
def test_vocab_choice(lib: Library, t: str, C: int, V: int, D: int) -> None:
    x, w, bias = rand(C, D, t=t), rand(V, D, t=t, scale=0.5), rand(V, t=t)
    live, mask_id = (torch.rand(C) > 0.3).to(torch.uint8), V - 1
    live[0] = 1
    token, confidence, margin, entropy = Choices.run(lib, t, x, w, bias, mask_id, live)
    on = live.bool()
    assert (token[~on] == -1).all() and (entropy[~on] == 0).all()
    assert (confidence[~on] == -math.inf).all() and (margin[~on] == -math.inf).all()

    # Logits are rounded to T; a sum in another order may round to the neighbour.
    z = run_linear(lib, t, x, w, bias, None).double()[on]
    p, open_z = z.softmax(-1), z.clone()
    open_z[:, mask_id] = -math.inf
    assert torch.equal(token[on], open_z.argmax(-1))
    assert_close(confidence[on], p.gather(1, token[on, None])[:, 0], 2e-6)
    two = p.masked_fill(open_z == -math.inf, 0).topk(min(2, V), -1).values
    assert (
        margin[on].double() - (two[:, 0] - two[:, -1] if V > 2 else two[:, 0])
    ).abs().max() < 2e-6
    assert (entropy[on].double() + (p * p.clamp(min=1e-300).log()).sum(-1)).abs().max() < 2e-5


@pytest.mark.parametrize("t", TYPES)
def test_vocab_choice_with_noise(lib: Library, t: str) -> None:
    C, V, D = 12, 700, 32
    x, w, temperature = rand(C, D, t=t), rand(V, D, t=t, scale=0.3), torch.tensor([0.0, 0.8, 2.0])
    token, confidence, *_ = Choices.run(lib, t, x, w, None, 0, temperature=temperature)
    z = run_linear(lib, t, x, w, None, None).double()
    for c in range(C):
        b = c // 4
        noisy = z[c].clone()
        if b:
            noisy = z[c] / float(temperature[b]) + gumbel(b * 77777777777 + 5, b + 3, c + 100, V)
        noisy[0] = -math.inf
        assert int(token[c]) == int(noisy.argmax())
    assert_close(confidence, z.softmax(-1).gather(1, token[:, None])[:, 0], 2e-6)


@few
@given(data=st.data())
def test_vocab_choice_breaks_ties_by_id(best: Library, data: st.DataObject) -> None:
    V = data.draw(st.integers(2, 600))
    level = st.integers(0, 2)
    spots = data.draw(st.dictionaries(st.integers(0, V - 1), level, max_size=12))
    mask_id = data.draw(st.integers(0, V - 1))
    w = torch.zeros(V, 1)
    for spot, value in spots.items():
        w[spot] = float(value)
    token, _, margin, _ = Choices.run(best, "f32", torch.ones(1, 1), w, None, mask_id)
    open_z = w[:, 0].clone()
    open_z[mask_id] = -math.inf
    best_token = int((open_z == open_z.max()).nonzero()[0])
    assert int(token) == best_token
    if V > 2:
        two = open_z.topk(2).values
        assert (float(margin) == 0) == bool(two[0] == two[1])


def test_vocab_choice_with_equal_infinite_and_nan_logits(lib: Library) -> None:
    w = torch.ones(300, 1)
    x = torch.tensor([[1.0], [-math.inf], [math.nan], [math.inf]])
    token, *_ = Choices.run(lib, "f32", x, w, None, 0)
    assert token.tolist() == [1, 1, 1, 1]


def test_vocab_choice_with_bad_logits_far_from_the_mask(lib: Library) -> None:
    w = torch.randn(2000)
    w[300:500] = math.nan
    w[512:768] = -math.inf
    w[[1030, 1500]] = 9.0
    inf = w.clone()
    inf[1800] = math.inf
    worst = torch.full((2000,), -math.inf)
    for z, best_token in ((w, 1030), (inf, 1800), (worst, 1)):
        token, *_ = Choices.run(lib, "f32", torch.ones(1, 1), z[:, None].contiguous(), None, 0)
        assert token.item() == best_token
    z = w.clone()
    z[300:500] = 0.0
    _, confidence, margin, entropy = Choices.run(
        lib, "f32", torch.ones(1, 1), z[:, None].contiguous(), None, 0
    )
    p = z.double().softmax(0)
    assert_close(confidence, p[1030][None], 2e-6)
    assert margin.item() == 0
    assert abs(entropy.item() + torch.special.xlogy(p, p).sum().item()) < 2e-5
