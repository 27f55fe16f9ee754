"""Norms, and the rotary embedding with its write."""

from __future__ import annotations

import pytest
import torch
from guards import CLOSE, TYPES, Out, assert_close, guarded, rand
from native import Library


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("D", [1, 16, 31, 1024])
@pytest.mark.parametrize("weighted", [True, False])
def test_norms(lib: Library, t: str, D: int, weighted: bool) -> None:
    R, eps = 5, 1e-5
    x, r = rand(R, D, t=t), rand(R, D, t=t)
    w = rand(D, t=t) if weighted else None
    y, total, z = (Out(R, D, dtype=TYPES[t]) for _ in range(3))
    lib.call(f"rms_norm_{t}", y.tensor, x, w, R, D, eps)
    lib.call(f"add_rms_norm_{t}", total.tensor, z.tensor, x, r, w, R, D, eps)

    def norm(a: torch.Tensor) -> torch.Tensor:
        a = a.double()
        a = a * (a.square().mean(-1, keepdim=True) + eps).rsqrt()
        return a if w is None else a * w.double()

    assert_close(y.check(), norm(x), CLOSE[t])
    assert torch.equal(total.check(), (x.float() + r.float()).to(TYPES[t]))
    assert_close(z.check(), norm(total.tensor), CLOSE[t])


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("D, rot", [(64, 64), (80, 32), (6, 2), (16, 0)])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_rope_write(lib: Library, t: str, D: int, rot: int, normed: bool) -> None:
    R, H, G, N, L, eps = 9, 4, 2, 3, 7, 1e-6
    qkv = rand(R, (H + 2 * G) * D, t=t)
    wq, wk = (rand(D, t=t), rand(D, t=t)) if normed else (None, None)
    cos, sin = guarded(torch.randn(L, rot)), guarded(torch.randn(L, rot))
    place = torch.randperm(N * L)[:R]
    seq, pos = place // L, place % L
    q = Out(R, H, D, dtype=TYPES[t])
    keys, values = Out(N, L, G, D, dtype=TYPES[t]), Out(N, L, G, D, dtype=TYPES[t])
    lib.call(
        f"norm_rope_write_{t}",
        *(q.tensor, keys.tensor, values.tensor, qkv, wq, wk, cos, sin, seq, pos),
        *(R, H, G, D, L, rot, eps),
    )

    def rotate(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        if w is not None:
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w.double()
        turned, rest = x[..., :rot], x[..., rot:]
        a, b = turned.chunk(2, -1)
        c, s = cos[pos].double()[:, None], sin[pos].double()[:, None]
        return torch.cat([turned * c + torch.cat([-b, a], -1) * s, rest], -1)

    heads = qkv.double().view(R, -1, D)
    want_q, want_k, want_v = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
    assert_close(q.check(), rotate(want_q, wq), CLOSE[t])
    assert_close(keys.check()[seq, pos], rotate(want_k, wk), CLOSE[t])
    assert torch.equal(values.check()[seq, pos], want_v.to(TYPES[t]))
    assert keys.tensor.isnan().sum() == (N * L - R) * G * D  # nothing else was written
