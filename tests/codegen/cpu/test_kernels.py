"""Every kernel against its formula in float64, on every instruction set that this machine runs.

Outputs are filled with NaN and stand between canaries, so a kernel that leaves a hole or writes
beside its output is found out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native import Library, Value

from dcompile.codegen import pack
from dcompile.codegen.cpu import build
from dcompile.ir.operators import SCORES
from dcompile.ir.operators.route_limited import route_limited
from dcompile.runtime.processor import cpu_flags

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CLOSE = {"f32": 1e-6, "bf16": 5e-3, "f16": 1e-3}


# sse4a says where avx512bf16 is worth taking, not where it runs.
ISAS = build.runnable([*cpu_flags(), "sse4a"])

few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="session", params=ISAS)
def lib(request: pytest.FixtureRequest) -> Library:
    return Library(build.build_library([request.param])[request.param])


@pytest.fixture(scope="session")
def best() -> Library:
    return Library(build.build_library([ISAS[0]])[ISAS[0]])


@pytest.fixture(autouse=True)
def replayable(request: pytest.FixtureRequest) -> None:
    """Each test draws from its own stream, so that a failure happens again."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


class Out:
    """An output full of NaN (or -77) with canaries on both sides."""

    PAD = 64

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        n = math.prod(shape)
        self._whole = torch.full((n + 2 * self.PAD,), 99, dtype=dtype)
        self.tensor = self._whole[self.PAD : self.PAD + n].view(shape)
        self.tensor.fill_(math.nan if dtype.is_floating_point else -77)

    def check(self) -> torch.Tensor:
        assert (self._whole[: self.PAD] == 99).all()
        assert (self._whole[-self.PAD :] == 99).all()
        return self.tensor


def guarded(x: torch.Tensor) -> torch.Tensor:
    """Return x followed by NaN: reading beyond it shows."""
    whole = torch.full((x.numel() + 64,), math.nan, dtype=x.dtype)
    whole[: x.numel()] = x.flatten()
    return whole[: x.numel()].view(x.shape)


def rand(*shape: int, t: str, scale: float = 1.0) -> torch.Tensor:
    return guarded((torch.randn(shape) * scale).to(TYPES[t]))


def assert_close(
    got: torch.Tensor, want: torch.Tensor, limit: float, terms: torch.Tensor | None = None
) -> None:
    """Compare norms; against the size of the terms of a sum, where so few values may cancel."""
    assert got.isfinite().all()
    if got.numel() < 16:
        limit *= 8  # a handful of values may all be small by cancellation
    size = (want if terms is None else terms).norm().clamp(min=1e-30)
    error = (got.double() - want).norm() / size
    assert error <= limit, f"{error:.2e} > {limit:.0e}"


# ---- rows by themselves


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
@pytest.mark.parametrize("width", [1, 32, 77])
def test_silu_mul(lib: Library, t: str, width: int) -> None:
    both, y = rand(6, 2 * width, t=t, scale=3), Out(6, width, dtype=TYPES[t])
    up = both.view(-1)[width:]
    lib.call(f"silu_mul_{t}", y.tensor, both, up, 6, width, 2 * width, 2 * width)
    gate, up = both.double().chunk(2, -1)
    assert_close(y.check(), F.silu(gate) * up, CLOSE[t])


@pytest.mark.parametrize("t", TYPES)
def test_embedding_and_gather_rows(lib: Library, t: str) -> None:
    table, ids = rand(11, 7, t=t), torch.tensor([10, 0, 3, 3])
    a, b = Out(4, 7, dtype=TYPES[t]), Out(4, 7, dtype=TYPES[t])
    lib.call(f"embedding_{t}", a.tensor, table, ids, 4, 7)
    lib.call("gather_rows", b.tensor, table, ids, 4, 7 * table.element_size())
    assert torch.equal(a.check(), table[ids])
    assert torch.equal(b.check(), table[ids])


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


# ---- linear


def run_linear(
    lib: Library, t: str, x: torch.Tensor, w: torch.Tensor, bias: Value, residual: Value
) -> torch.Tensor:
    y = Out(x.shape[0], w.shape[0], dtype=TYPES[t])
    packed = guarded(pack.pack_linear(w))
    lib.call(f"linear_{t}", y.tensor, x, packed, bias, residual, len(x), *w.shape)
    return y.check()


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize(
    "R, N, K", [(1, 1, 1), (2, 33, 3), (13, 64, 511), (15, 37, 1025), (29, 96, 64), (64, 31, 513)]
)
def test_linear(lib: Library, t: str, R: int, N: int, K: int) -> None:
    x, w, bias, residual = rand(R, K, t=t), rand(N, K, t=t), rand(N, t=t), rand(R, N, t=t)
    product = x.double() @ w.double().T
    terms = x.double().abs() @ w.double().abs().T
    assert_close(run_linear(lib, t, x, w, None, None), product, CLOSE[t], terms)
    got = run_linear(lib, t, x, w, bias, residual)
    terms = terms + bias.double().abs() + residual.double().abs()
    assert_close(got, product + bias.double() + residual.double(), CLOSE[t], terms)


@few
@given(
    R=st.integers(1, 80), N=st.integers(1, 140), K=st.integers(1, 700), t=st.sampled_from([*TYPES])
)
def test_linear_any_shape(best: Library, R: int, N: int, K: int, t: str) -> None:
    torch.manual_seed(R + N + K)
    x, w = rand(R, K, t=t), rand(N, K, t=t)
    terms = x.double().abs() @ w.double().abs().T
    product = x.double() @ w.double().T
    assert_close(run_linear(best, t, x, w, None, None), product, CLOSE[t], terms)


# Weights of over 2 MiB: what is written goes past the caches, where the output's rows let it.
@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("R, N", [(1, 1088), (33, 1088), (48, 1090), (49, 1088), (70, 1104)])
def test_linear_of_large_weights(lib: Library, t: str, R: int, N: int) -> None:
    K = 1040
    x, w, bias, residual = rand(R, K, t=t), rand(N, K, t=t), rand(N, t=t), rand(R, N, t=t)
    terms = x.double().abs() @ w.double().abs().T + bias.double().abs() + residual.double().abs()
    wanted = x.double() @ w.double().T + bias.double() + residual.double()
    aligned = run_linear(lib, t, x, w, bias, residual)
    assert_close(aligned, wanted, CLOSE[t], terms)
    elsewhere = torch.full((R * N + 1,), math.nan, dtype=TYPES[t])[1:].view(R, N)
    packed = guarded(pack.pack_linear(w))
    lib.call(f"linear_{t}", elsewhere, x, packed, bias, residual, R, N, K)
    assert torch.equal(elsewhere, aligned)


def test_linear_of_no_rows(lib: Library) -> None:
    assert run_linear(lib, "f32", torch.empty(0, 8), torch.ones(4, 8), None, None).shape == (0, 4)


@pytest.mark.parametrize("t", TYPES)
def test_linear_of_many_rows(best: Library, t: str) -> None:
    x, w = rand(2500, 700, t=t), rand(70, 700, t=t)
    terms = x.double().abs() @ w.double().abs().T
    product = x.double() @ w.double().T
    assert_close(run_linear(best, t, x, w, None, None), product, CLOSE[t], terms)


# ---- attention


def attend_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq: torch.Tensor, limit: torch.Tensor
) -> torch.Tensor:
    heads = q.shape[1] // k.shape[2]
    out = torch.zeros(q.shape, dtype=torch.double)
    for r in range(len(q)):
        n = int(limit[r])
        keys = k[seq[r], :n].double().repeat_interleave(heads, 1)
        values = v[seq[r], :n].double().repeat_interleave(heads, 1)
        scores = torch.einsum("hd,lhd->hl", q[r].double(), keys) * q.shape[-1] ** -0.5
        out[r] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values)
    return out


def run_attend(
    lib: Library,
    t: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq: torch.Tensor,
    limit: torch.Tensor,
) -> torch.Tensor:
    (R, H, D), (_, L, G, _) = q.shape, k.shape
    o = Out(R, H, D, dtype=TYPES[t])
    lib.call(f"attend_{t}", o.tensor, q, k, v, seq, limit, R, H, G, D, L, D**-0.5)
    return o.check()


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize(
    "R, H, G, D, L",
    [
        (1, 1, 1, 16, 1),
        (33, 4, 2, 64, 200),
        (9, 6, 1, 80, 65),
        (5, 2, 2, 33, 130),
        (70, 2, 1, 128, 70),
    ],
)
def test_attend(lib: Library, t: str, R: int, H: int, G: int, D: int, L: int) -> None:
    q, k, v = rand(R, H, D, t=t, scale=2), rand(3, L, G, D, t=t), rand(3, L, G, D, t=t)
    seq = torch.randint(0, 3, (R,)).sort().values
    limit = torch.randint(0, L + 1, (3,))[seq]
    limit[-1] = L
    for n in range(3):  # keys above every limit must not be looked at
        top = int(limit[seq == n].max()) if (seq == n).any() else 0
        k[n, top:], v[n, top:] = math.nan, math.nan
    got = run_attend(lib, t, q, k, v, seq, limit)
    assert_close(got, attend_reference(q, k, v, seq, limit), CLOSE[t])
    assert (got[limit == 0] == 0).all()


@few
@given(data=st.data(), t=st.sampled_from([*TYPES]))
def test_attend_any_limits(best: Library, data: st.DataObject, t: str) -> None:
    torch.manual_seed(0)
    rows = data.draw(
        st.lists(st.tuples(st.integers(0, 1), st.integers(0, 70)), min_size=1, max_size=20)
    )
    seq, limit = (torch.tensor(column) for column in zip(*rows, strict=True))
    q, k, v = rand(len(rows), 2, 24, t=t), rand(2, 70, 1, 24, t=t), rand(2, 70, 1, 24, t=t)
    got = run_attend(best, t, q, k, v, seq, limit)
    assert_close(got, attend_reference(q, k, v, seq, limit), 2 * CLOSE[t])


def test_attend_with_scores_far_apart(lib: Library) -> None:
    q, k, v = (
        rand(2, 1, 16, t="f32", scale=40),
        rand(1, 300, 1, 16, t="f32", scale=40),
        rand(1, 300, 1, 16, t="f32"),
    )
    seq, limit = torch.zeros(2, dtype=torch.long), torch.full((2,), 300)
    # Scores of hundreds: their own rounding is what is left of the error.
    assert_close(
        run_attend(lib, "f32", q, k, v, seq, limit), attend_reference(q, k, v, seq, limit), 1e-4
    )


# ---- mixture of experts

ACTIVATIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    F.silu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
]


class Experts:
    def __init__(self, E: int, D: int, width: int, t: str, biased: bool = True) -> None:
        self.t, self.D, self.width, self.E = t, D, width, E
        self.gate_up = rand(E, 2 * width, D, t=t, scale=D**-0.5)
        self.down = rand(E, D, width, t=t, scale=width**-0.5)
        self.biases = (rand(E, 2 * width, t=t), rand(E, D, t=t)) if biased else (None, None)
        self.packed = (
            guarded(pack.pack_experts(self.gate_up)),
            guarded(pack.pack_experts(self.down)),
        )

    def run(
        self,
        lib: Library,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        act: int = 0,
    ) -> torch.Tensor:
        y = Out(*x.shape, dtype=TYPES[self.t])
        sizes = (len(x), self.D, self.width, self.E, experts.shape[1], act)
        lib.call(
            f"moe_ffn_{self.t}", y.tensor, x, weights, experts, *self.packed, *self.biases, *sizes
        )
        return y.check()

    def reference(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, act: int = 0
    ) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=torch.double)
        for e in range(self.E):
            rows, rank = (experts == e).nonzero(as_tuple=True)
            h = x[rows].double() @ self.gate_up[e].double().T
            h = h if self.biases[0] is None else h + self.biases[0][e].double()
            gate, up = h.chunk(2, -1)
            v = (ACTIVATIONS[act](gate) * up) @ self.down[e].double().T
            v = v if self.biases[1] is None else v + self.biases[1][e].double()
            out.index_add_(0, rows, v * weights[rows, rank, None].double())
        return out


def choose(R: int, E: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    experts = torch.stack([torch.randperm(E)[:k] for _ in range(R)]).int()
    return torch.rand(R, k), experts


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize(
    "R, D, width, E, k",
    [
        (1, 8, 5, 3, 2),
        (33, 64, 48, 8, 3),
        (7, 70, 33, 4, 4),
        (90, 40, 32, 5, 1),
        (3, 520, 516, 16, 2),
        (44, 264, 160, 10, 3),  # over 2 MiB of weights
        (130, 96, 140, 30, 4),
    ],
)
def test_moe_ffn(lib: Library, t: str, R: int, D: int, width: int, E: int, k: int) -> None:
    for act, biased in [(0, False), (1, True), (2, True), (3, True)]:
        layer = Experts(E, D, width, t, biased)
        x, chosen = rand(R, D, t=t), choose(R, E, k)
        assert_close(layer.run(lib, x, *chosen, act), layer.reference(x, *chosen, act), CLOSE[t])


@few
@given(data=st.data(), t=st.sampled_from([*TYPES]))
def test_moe_ffn_any_assignment(best: Library, data: st.DataObject, t: str) -> None:
    torch.manual_seed(1)
    E, k = 6, data.draw(st.integers(1, 6))
    rows = data.draw(st.lists(st.permutations(range(E)), min_size=1, max_size=40))
    experts = torch.tensor(rows)[:, :k].int().contiguous()
    layer, x, weights = Experts(E, 33, 20, t), rand(len(rows), 33, t=t), torch.rand(len(rows), k)
    got = layer.run(best, x, weights, experts)
    assert_close(got, layer.reference(x, weights, experts), CLOSE[t])


@pytest.mark.parametrize("t", TYPES)
def test_moe_ffn_one_expert_takes_all_of_many_rows(best: Library, t: str) -> None:
    R = 4096
    layer, x = Experts(8, 48, 32, t), rand(R, 48, t=t)
    weights, experts = torch.rand(R, 1), torch.full((R, 1), 5, dtype=torch.int32)
    assert_close(
        layer.run(best, x, weights, experts), layer.reference(x, weights, experts), CLOSE[t]
    )


@pytest.mark.parametrize("t", TYPES)
def test_moe_ffn_keeps_bad_rows_apart(lib: Library, t: str) -> None:
    layer, x = Experts(4, 40, 24, t), rand(20, 40, t=t)
    weights, experts = choose(20, 4, 2)
    good = layer.run(lib, x, weights, experts).clone()
    x[3, 5], x[7, 0] = math.nan, math.inf
    y = torch.empty_like(x)
    sizes = (20, 40, 24, 4, 2, 0)
    lib.call(f"moe_ffn_{t}", y, x, weights, experts, *layer.packed, *layer.biases, *sizes)
    rest = [r for r in range(20) if r not in (3, 7)]
    assert torch.equal(y[rest], good[rest])
    assert y[3].isnan().all()
    assert not y[7].isfinite().all()


@pytest.mark.parametrize("t", TYPES)
def test_odd_widths_see_nothing_of_earlier_scratch(lib: Library, t: str) -> None:
    """A weight's odd K is padded with a zero, which a NaN left in scratch memory would spoil."""
    bad = torch.full((40, 520), math.nan, dtype=TYPES[t])
    x, w, layer = rand(3, 511, t=t), rand(40, 511, t=t), Experts(3, 9, 5, t)
    rows, chosen = rand(2, 9, t=t), choose(2, 3, 2)
    wanted = run_linear(lib, t, x, w, None, None).clone()
    wanted_rows = layer.run(lib, rows, *chosen).clone()
    for _ in range(2):
        y = torch.empty(40, 64, dtype=TYPES[t])
        packed = pack.pack_linear(rand(64, 520, t=t))
        lib.call(f"linear_{t}", y, bad, packed, None, None, 40, 64, 520)
        assert torch.equal(run_linear(lib, t, x, w, None, None), wanted)
        lib.call(f"linear_{t}", y, bad, packed, None, None, 40, 64, 520)
        assert torch.equal(layer.run(lib, rows, *chosen), wanted_rows)


# ---- routing


def run_route(
    lib: Library, logits: torch.Tensor, bias: torch.Tensor | None, k: int, *how: Value
) -> tuple[torch.Tensor, torch.Tensor]:
    R, E = logits.shape
    weights, experts = Out(R, k, dtype=torch.float32), Out(R, k, dtype=torch.int32)
    lib.call("route", weights.tensor, experts.tensor, logits, bias, R, E, k, *how)
    return weights.check(), experts.check()


def route_reference(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    score: int,
    groups: int,
    kept: int,
    renormalize: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    name = SCORES[score]
    z = logits.double()
    scores = z.sigmoid() if name.startswith("sigmoid") else z.softmax(-1)
    # Ties are decided on float32 values, as the kernel has them.
    keys = (scores if name in ("softmax", "sigmoid") else z).float()
    keys = keys + (0 if bias is None else bias)
    if groups > 1:
        grouped = keys.view(len(keys), groups, -1)
        two = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        keep = two.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
        mask = torch.zeros_like(two).scatter_(1, keep, 1.0).bool()
        keys = grouped.masked_fill(~mask[..., None], -math.inf).flatten(1)
    experts = keys.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, experts)
    if name == "softmax_chosen":
        weights = z.gather(1, experts).softmax(-1)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, experts.int()


@pytest.mark.parametrize("E, k", [(1, 1), (8, 8), (32, 4), (64, 8), (37, 5), (256, 8)])
@pytest.mark.parametrize("score", range(len(SCORES)), ids=SCORES)
@pytest.mark.parametrize("renormalize", [0, 1])
def test_route(lib: Library, E: int, k: int, score: int, renormalize: int) -> None:
    logits, bias = guarded(torch.randn(40, E)), guarded(torch.randn(E) * 0.1)
    for b in (None, bias):
        for groups, kept in [(1, 1), (4, 2)] if E % 4 == 0 and k <= E // 2 else [(1, 1)]:
            how = (score, groups, kept, renormalize, 2.5)
            weights, experts = run_route(lib, logits, b, k, *how)
            want_weights, want_experts = route_reference(logits, b, k, *how)
            assert torch.equal(experts, want_experts)
            assert_close(weights, want_weights, 1e-6)


@few
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-1.0, 0.0, 0.0, 2.0]), min_size=8, max_size=8),
        min_size=1,
        max_size=4,
    ),
    k=st.integers(1, 8),
)
def test_route_breaks_ties_by_index(best: Library, rows: list[list[float]], k: int) -> None:
    logits = torch.tensor(rows)
    _, experts = run_route(best, logits, None, k, 0, 1, 1, 0, 1.0)
    assert torch.equal(
        experts, logits.sort(dim=-1, descending=True, stable=True).indices[:, :k].int()
    )


def test_logits_stay_apart_where_scores_do_not(lib: Library) -> None:
    """Softmax rounds all but the best to 0, sigmoid all to 1: only the logits know the order."""
    logits = torch.tensor([[200.0, 30.0, 40.0, 50.0, 41.0]])
    for score, order in [
        (0, [0, 1, 2]),
        (1, [0, 1, 2]),
        (2, [0, 3, 4]),
        (3, [0, 3, 4]),
        (4, [0, 3, 4]),
    ]:
        assert run_route(lib, logits, None, 3, score, 1, 1, 0, 1.0)[1].tolist() == [order]


@pytest.mark.parametrize(
    "E, k, groups, capacity, reroute, pool",
    [(8, 2, 1, 1.0, 0, 0), (13, 3, 1, 1.5, 1, 0), (16, 2, 4, 0.0, 0, 5), (37, 5, 1, 0.7, 1, 9)],
)
@pytest.mark.parametrize("score", range(len(SCORES)), ids=SCORES)
def test_route_limited(
    lib: Library, E: int, k: int, groups: int, capacity: float, reroute: int, pool: int, score: int
) -> None:
    """The same experts as the reference, and its weights to rounding; rows in any order."""
    seq = torch.tensor([2] * 9 + [0] * 5 + [1] * 17)[torch.randperm(31)]
    pos = torch.randint(0, 40, (31,))
    blocks = torch.tensor([0, 2]), torch.tensor([[3, 4, 5], [9, 10, 11]])
    logits, bias = guarded(torch.randn(31, E).mul(2).round()), guarded(torch.randn(E) * 0.1)
    logits[3, 1], logits[4] = math.nan, math.nan
    for b in (None, bias):
        kept = min(groups, 2)
        how = (SCORES[score], groups, kept, True, 2.5, capacity, bool(reroute), pool)
        wanted = route_limited(logits, b, seq, pos, *blocks, k, *how)
        weights, experts = Out(31, k, dtype=torch.float32), Out(31, k, dtype=torch.int32)
        out = weights.tensor, experts.tensor
        numbers = (31, 2, E, k, score, groups, kept, 1, 2.5, capacity, reroute, pool, 3)
        lib.call("route_limited", *out, logits, b, seq, pos, *blocks, *numbers)
        assert torch.equal(experts.check(), wanted[1])
        good = wanted[0].isfinite()
        assert torch.equal(good, weights.check().isfinite())
        assert_close(weights.check()[good], wanted[0][good].double(), 1e-6)


@pytest.mark.parametrize("sigmoid", [0, 1])
@pytest.mark.parametrize("groups", [1, 4])
def test_route_survives_nan(lib: Library, sigmoid: int, groups: int) -> None:
    logits = torch.randn(5, 16)
    logits[0], logits[1, 3], logits[2, ::2], logits[3, 4] = math.nan, math.nan, math.nan, math.inf
    _, experts = run_route(lib, logits, None, 6, sigmoid, groups, min(groups, 2), 1, 1.0)
    for row in experts.tolist():
        assert len(set(row)) == 6 and all(0 <= e < 16 for e in row)
    if sigmoid and groups == 1:
        assert 3 not in experts[1].tolist()


# ---- the choice of tokens


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


class Choices:
    def __init__(self, C: int) -> None:
        self.outs = (Out(C, dtype=torch.int64), *(Out(C, dtype=torch.float32) for _ in range(3)))

    @classmethod
    def run(
        cls,
        lib: Library,
        t: str,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: Value,
        mask_id: int,
        live: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        C, B = len(x), 1 if temperature is None else len(temperature)
        self = cls(C)
        seed, tick = torch.arange(B) * 77777777777 + 5, torch.arange(B) + 3
        lib.call(
            f"vocab_choice_{t}",
            *(out.tensor for out in self.outs),
            *(x, guarded(pack.pack_linear(w)), bias),
            torch.ones(C, dtype=torch.uint8) if live is None else live,
            torch.zeros(B) if temperature is None else temperature,
            *(seed, tick, torch.arange(C) + 100, C, B, *w.shape, mask_id),
        )
        return [out.check() for out in self.outs]


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


# ---- rows do not see one another, nor the number of threads


@pytest.mark.parametrize("t", TYPES)
def test_rows_are_invariant(lib: Library, t: str) -> None:
    R, D, V, E, k = 61, 320, 4160, 8, 3
    x, w, layer = rand(R, D, t=t), rand(V, D, t=t), Experts(E, D, 160, t)
    weights, experts = choose(R, E, k)
    q, keys, values = rand(R, 4, 40, t=t), rand(2, 150, 2, 40, t=t), rand(2, 150, 2, 40, t=t)
    seq, limit = torch.arange(R) // 31, torch.where(torch.arange(R) < 50, 131, 150)

    def everything(rows: torch.Tensor) -> list[torch.Tensor]:
        a = x[rows].contiguous()
        at = (q[rows].contiguous(), keys, values, seq[rows].contiguous(), limit[rows].contiguous())
        routed = weights[rows].contiguous(), experts[rows].contiguous()
        return [
            run_linear(lib, t, a, w, None, None),
            layer.run(lib, a, *routed),
            run_attend(lib, t, *at),
            *Choices.run(lib, t, a, w, None, 3),
        ]

    every = torch.arange(R)
    lib.set_threads(2)
    whole = everything(every)
    lib.set_threads(1)
    for got, want in zip(everything(every), whole, strict=True):
        assert torch.equal(got, want)
    for rows in (
        torch.tensor([0]),
        torch.tensor([60]),
        torch.tensor([5, 33, 34, 59]),
        torch.arange(30, 47),
        torch.arange(7, 50),
    ):
        for got, want in zip(everything(rows), whole, strict=True):
            assert torch.equal(got, want[rows])
    lib.set_threads(2)


def test_a_list_of_kernels_runs_by_one_call(best: Library) -> None:
    x, index = torch.randn(4, 8), torch.tensor([3, 1])
    a, b = torch.empty(2, 8), torch.empty(2, 8)
    calls: list[tuple[str, list[Value]]] = [
        ("gather_rows", [a, x, index, 2, 32]),
        ("rms_norm_f32", [b, a, None, 2, 8, 0.0]),
    ]
    best.run(calls)
    assert torch.equal(a, x[index])
    assert all(s > 0 for s in best.run(calls, timed=True))


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize(
    "R, V, D, E", [(1, 2, 4, 4), (7, 1000, 64, 33), (40, 515, 33, 64), (150, 256, 16, 16)]
)
def test_soft_embed(lib: Library, t: str, R: int, V: int, D: int, E: int) -> None:
    x, w, bias = rand(R, D, t=t), rand(V, D, t=t, scale=0.5), rand(V, t=t)
    table, weight = rand(V + 3, E, t=t), torch.rand(R)
    live = (torch.rand(R) > 0.3).to(torch.uint8)
    live[0] = 1

    def run(rows: torch.Tensor) -> torch.Tensor:
        out = Out(len(rows), E, dtype=TYPES[t])
        packed = guarded(pack.pack_linear(w))
        shape = (len(rows), V, D, E, len(table))
        lib.call(
            f"soft_embed_{t}",
            out.tensor,
            x[rows],
            packed,
            bias,
            table,
            live[rows],
            weight[rows],
            *shape,
        )
        return out.check()

    y = run(torch.arange(R))
    z = run_linear(lib, t, x, w, bias, None).double()
    wanted = weight[:, None].double() * (z.softmax(-1) @ table[:V].double())
    assert (y[live == 0] == 0).all()
    assert_close(y[live == 1], wanted[live == 1], CLOSE[t])
    # A row's bits are its own.
    some = torch.randperm(R)[: max(R // 2, 1)]
    assert torch.equal(run(some), y[some])


def test_soft_embed_with_infinite_and_nan_logits(lib: Library) -> None:
    w = torch.tensor([[math.inf], [1.0], [math.nan]])
    out = Out(2, 2, dtype=torch.float32)
    table, one = torch.ones(3, 2), torch.ones(2)
    x = torch.tensor([[1.0], [-1.0]])
    args = (x, guarded(pack.pack_linear(w)), None, table, torch.ones(2, dtype=torch.uint8), one)
    lib.call("soft_embed_f32", out.tensor, *args, 2, 3, 1, 2, 3)
    # +inf leaves no probability; -inf leaves the finite logit, and a NaN counts as -inf.
    assert torch.equal(out.check(), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
