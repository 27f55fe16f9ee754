"""Limits on routing: what they mean, row by row; the kernel against the reference; whole artifacts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import spellings
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import decode
from spellings import Mixture, Sizes
from torch import Tensor, nn

import dcompile
from dcompile.errors import OptionError
from dcompile.ir.operators.route import SCORES, route
from dcompile.ir.operators.route_limited import route_limited

MASK = 60


def limited(logits: Tensor, seq: Tensor, k: int = 2, **limits: object) -> tuple[Tensor, Tensor]:
    """One block of 4 positions a sequence, beginning at 0."""
    rows, count = torch.arange(len(seq)), int(seq.max()) + 1
    pos = rows - torch.tensor([int((seq == s).nonzero()[0]) for s in seq.tolist()])
    blocks = torch.arange(count), torch.arange(4).expand(count, 4)
    how = {"capacity": 0.0, "reroute": False, "pool": 0, **limits}
    return route_limited(
        logits, None, seq, pos, *blocks, k, "softmax", 1, 1, False, 1.0, *how.values()
    )


def test_an_expert_keeps_its_best_rows() -> None:
    logits = torch.tensor([[3.0, 0, -9, -9], [5.0, 0, -9, -9], [3.0, -9, -9, 0], [4.0, -9, 0, -9]])
    weights, experts = limited(logits, torch.zeros(4, dtype=torch.int64), capacity=1.0)
    # ceil(1 * 4 rows * 2 / 4) = 2 of four rows; rows 0 and 2 tie below.
    assert experts.tolist() == [[-1, 1], [0, 1], [-1, 3], [0, 2]]
    assert weights[0, 0] == 0 and weights[0, 1] == logits.softmax(-1)[0, 1]


def test_a_tie_goes_to_the_lower_row() -> None:
    logits = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    _, experts = limited(logits, torch.zeros(4, dtype=torch.int64), k=1, capacity=1.0)
    assert experts[:, 0].tolist() == [0, 0, -1, -1]


def test_a_row_is_sent_to_its_best_expert_with_room() -> None:
    logits = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    seq = torch.zeros(4, dtype=torch.int64)
    weights, experts = limited(logits, seq, k=1, capacity=1.0, reroute=True)
    assert experts[:, 0].tolist() == [0, 0, 1, 1]
    assert torch.allclose(weights[2, 0], logits.softmax(-1)[2, 1])


def test_a_pool_keeps_the_experts_that_some_row_wants_most() -> None:
    logits = torch.tensor([[9.0, 1, 0, 8], [0, 1, 7.0, 2], [0, 1, 6.0, 2], [1, 0, 7, 2]])
    _, experts = limited(logits, torch.zeros(4, dtype=torch.int64), pool=2)
    assert set(experts.flatten().tolist()) == {0, 2}


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    experts=st.integers(2, 9),
    capacity=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    reroute=st.booleans(),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_what_limits_promise(
    rows: list[int],
    experts: int,
    capacity: float,
    reroute: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    """Bounds hold, choices are distinct, and a sequence alone gets what it gets beside others."""
    k = data.draw(st.integers(1, experts))
    pool = data.draw(st.sampled_from([0, *range(k, experts + 1)]))
    logits = torch.randint(-3, 4, (sum(rows), experts), generator=torch.manual_seed(seed)).float()
    seq = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    limits = {"k": k, "capacity": capacity, "reroute": reroute, "pool": pool}
    weights, chosen = limited(logits, seq, **limits)
    for s, count in enumerate(rows):
        mine = chosen[seq == s]
        alone = limited(logits[seq == s], torch.zeros(count, dtype=torch.int64), **limits)
        assert torch.equal(alone[1], mine) and torch.equal(alone[0], weights[seq == s])
        used = mine[mine >= 0]
        if capacity:
            room = max(1, math.ceil(capacity * count * k / experts - 1e-9))
            assert int(used.bincount(minlength=1).max()) <= room if len(used) else True
        if pool:
            for block in mine.split(4):
                assert len(set(block[block >= 0].tolist())) <= pool
        for row in mine.tolist():
            kept = [e for e in row if e >= 0]
            assert len(set(kept)) == len(kept)
    assert bool((weights[chosen < 0] == 0).all())
    if not capacity and not pool:
        plain = route(logits, None, k, "softmax", 1, 1, False, 1.0)
        assert torch.equal(chosen, plain[1]) and torch.equal(weights, plain[0])


class Model(nn.Module):
    """Embedding, attention, norm, a mixture, head."""

    def __init__(self, router: spellings.Router, sizes: Sizes, experts: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = sizes.hidden
        self.embed, self.head = nn.Embedding(61, hidden), nn.Linear(hidden, 61, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.block = Mixture(sizes, router, spellings.einsum_all) if experts else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.head(x + self.block(self.norm(x)))


SIZES = Sizes(hidden=16, inner=8, experts=8, top_k=2)


@pytest.mark.parametrize(
    "limits",
    [
        {"moe_capacity": 1.0, "moe_overflow": "drop"},
        {"moe_capacity": 1.0, "moe_overflow": "reroute", "expert_pool": 5},
    ],
)
def test_a_sequence_does_not_depend_on_its_neighbours(
    limits: dict[str, object], tmp_path: Path
) -> None:
    model = Model(spellings.softmax_renormalised, SIZES).eval()
    options = {"mask_id": MASK, "max_length": 40, "block_length": 8, "batch": 3, "cache": "dual"}
    runner = dcompile.compile(model, out=tmp_path / "m.dcx", **options, **limits)
    kernels = [launch.kernel for launch in runner.artifact.plan.launches]
    assert "route_limited" in kernels and "route" not in kernels
    prompts = [[1, 2, 3], [7] * 11, [3, 1, 4, 1, 5, 9, 2, 6]]
    together = runner.generate(prompts, gen_length=16, threshold=0.3, early_stop=False)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = runner.generate([prompt], gen_length=16, threshold=0.3, early_stop=False)
        assert alone.all_tokens == result.all_tokens


def test_limits_that_never_bind_change_nothing(tmp_path: Path) -> None:
    model = Model(spellings.softmax_renormalised, SIZES).eval()
    options = {"mask_id": MASK, "max_length": 40, "block_length": 8, "cache": "none"}
    limits = {"moe_capacity": 4.0, "expert_pool": 8}
    runner = dcompile.compile(model, out=tmp_path / "m.dcx", **options, **limits)
    (result,) = runner.generate([[1, 2, 3, 4, 5]], gen_length=16, threshold=0.3, early_stop=False)
    wanted = decode(model, [1, 2, 3, 4, 5], 16, 8, MASK, threshold=0.3)
    assert (result.all_tokens, result.forwards) == wanted


def test_limits_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    options = {"mask_id": MASK, "max_length": 40, "block_length": 8, "out": tmp_path / "m.dcx"}
    dense = Model(spellings.softmax, SIZES, experts=False)
    with pytest.raises(OptionError, match="no mixture of experts"):
        dcompile.compile(dense, **options, moe_capacity=1.5)
    with pytest.raises(OptionError, match="pool of 1"):
        dcompile.compile(Model(spellings.softmax, SIZES), **options, expert_pool=1)
    with pytest.raises(OptionError, match="capacity"):
        dcompile.compile(dense, **options, moe_capacity=0.0)
    with pytest.raises(OptionError, match="overflow"):
        dcompile.compile(dense, **options, moe_overflow="reroute")
    assert set(SCORES) == {
        "softmax", "sigmoid", "softmax_chosen", "sigmoid_by_logits", "softmax_by_logits"
    }  # fmt: skip
