"""Attention over the keys below a limit."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_kernels import run_attend
from guards import CLOSE, TYPES, assert_close, few, rand
from hypothesis import given
from hypothesis import strategies as st
from native import Library


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
