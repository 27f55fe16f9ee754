"""Norms, gathers, gates, rotary embeddings: rows by themselves, against float64."""

from __future__ import annotations

import pytest
import torch
from close import CLOSE, assert_close
from interpreted import TYPES, poisoned, run

from dcompile.codegen.kernels import gather, norm_rope_write, norms, pointwise, silu_mul

both = pytest.mark.parametrize("t", ["f32", "bf16"])


def norm(a: torch.Tensor, w: torch.Tensor | None, eps: float) -> torch.Tensor:
    a = a.double()
    a = a * (a.square().mean(-1, keepdim=True) + eps).rsqrt()
    return a if w is None else a * w.double()


@both
@pytest.mark.parametrize("D", [1, 31, 128])
@pytest.mark.parametrize("weighted", [True, False])
def test_norms(t: str, D: int, weighted: bool) -> None:
    R, eps, dtype = 3, 1e-5, TYPES[t]
    x, r, w = (torch.randn(*s).to(dtype) for s in ((R, D), (R, D), (D,)))
    y, total, z = (poisoned(R, D, dtype=dtype) for _ in range(3))
    shape = {"rows": {"R": 1}, "hidden": D, "dtype": t, "eps": eps, "weighted": weighted}
    run(norms.launches(**shape), {"y": y, "x": x, "w": w}, R=R)
    assert_close(y, norm(x, w if weighted else None, eps), CLOSE[t])
    tensors = {"y": z, "total": total, "x": x, "r": r, "w": w}
    run(norms.launches(add=True, **shape), tensors, R=R)
    assert torch.equal(total, x + r)
    assert_close(z, norm(x + r, w if weighted else None, eps), CLOSE[t])


@both
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_of_column_slices(t: str, activation: str) -> None:
    R, F = 3, 37
    both_halves = (torch.randn(R, 2 * F) * 3).to(TYPES[t])
    y = poisoned(R, F, dtype=TYPES[t])
    lowering = silu_mul.launches(
        rows={"R": 1}, width=F, dtype=t, gate_stride=2 * F, up_stride=2 * F, activation=activation
    )
    gate, up = both_halves[:, :F], both_halves[:, F:]
    run(lowering, {"y": y, "gate": gate, "up": up}, R=R)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "relu": torch.relu,
    }
    assert_close(y, functions[activation](gate.double()) * up.double(), CLOSE[t])
    assert vars(pointwise)[activation]


@both
def test_gathers(t: str) -> None:
    V, W, R = 11, 37, 5
    table, index = torch.randn(V, W).to(TYPES[t]), torch.randint(V, (R,))
    out = poisoned(R, W, dtype=TYPES[t])
    lowering = gather.launches(rows={"R": 1}, width=W, dtype=t)
    run(lowering, {"out": out, "x": table, "index": index}, R=R)
    assert torch.equal(out, table[index])
    N, L = 2, 13
    canvas, seq, pos = (
        torch.randint(V, (N, L)),
        torch.randint(N, (R,)),
        torch.randint(L, (R,)),
    )
    out = poisoned(R, W, dtype=TYPES[t])
    lowering = gather.canvas_launches(rows={"R": 1}, positions=L, width=W, dtype=t)
    tensors = {"out": out, "table": table, "canvas": canvas, "row_seq": seq, "row_pos": pos}
    run(lowering, tensors, R=R)
    assert torch.equal(out, table[canvas[seq, pos]])


@both
@pytest.mark.parametrize(
    ("H", "G", "D", "rot", "normed"),
    [(5, 5, 8, 8, True), (6, 2, 12, 6, True), (3, 1, 16, 16, False), (4, 2, 10, 4, False)],
)
def test_norm_rope_write(t: str, H: int, G: int, D: int, rot: int, normed: bool) -> None:
    R, N, L, eps, dtype = 3, 2, 7, 1e-6, TYPES[t]
    qkv = torch.randn(R, (H + 2 * G) * D).to(dtype)
    q_norm, k_norm = torch.randn(D).to(dtype), torch.randn(D).to(dtype)
    cos, sin = torch.randn(L, rot), torch.randn(L, rot)
    place = torch.randperm(N * L)[:R]
    seq, pos = place // L, place % L
    before = torch.randn(2, N, L, G, D).to(dtype)
    keys, values = before.clone()
    q = poisoned(R, H, D, dtype=dtype)
    lowering = norm_rope_write.launches(
        **{"rows": {"R": 1}, "heads": H, "groups": G, "size": D, "positions": L, "rot": rot},
        **{"dtype": t, "eps": eps, "q_norm": normed, "k_norm": normed},
    )
    tensors = {"q": q, "keys": keys, "values": values, "qkv": qkv, "q_norm": q_norm}
    tensors |= {"k_norm": k_norm, "cos": cos, "sin": sin, "row_seq": seq, "row_pos": pos}
    run(lowering, tensors, R=R)

    def turned(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = norm(x, w, eps) if normed else x.double()
        head, tail = x[..., :rot], x[..., rot:]
        a, b = head.chunk(2, -1)
        c, s = cos[pos].double()[:, None], sin[pos].double()[:, None]
        return torch.cat((head * c + torch.cat((-b, a), -1) * s, tail), -1)

    rows = qkv.view(R, H + 2 * G, D)
    assert_close(q, turned(rows[:, :H], q_norm), CLOSE[t])
    assert_close(keys[seq, pos], turned(rows[:, H : H + G], k_norm), CLOSE[t])
    assert torch.equal(values[seq, pos], rows[:, H + G :])
    for cache, old in ((keys, before[0]), (values, before[1])):
        cache[seq, pos] = old[seq, pos]
        assert torch.equal(cache, old), "a place that is not the row's was written"
