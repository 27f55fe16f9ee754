"""Attention against float64: any rows of any slots, exact lengths, runs of keys merged."""

from __future__ import annotations

import pytest
import torch
from close import CLOSE, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import TYPES, poisoned, run

from dcompile.codegen.kernels import attend
from dcompile.codegen.triton.tiles import Tiles

N, L = 2, 70


def tensors(
    t: str, H: int, G: int, D: int, seq: list[int], limit: list[int]
) -> dict[str, torch.Tensor]:
    """Keys that no row may see are NaN, so that one that is read shows."""
    dtype, R = TYPES[t], len(seq)
    keys, values = (torch.randn(N, L, G, D).to(dtype) for _ in range(2))
    for slot in range(N):
        longest = max([n for s, n in zip(seq, limit, strict=True) if s == slot], default=0)
        keys[slot, longest:], values[slot, longest:] = torch.nan, torch.nan
    return {
        **{"o": poisoned(R, H, D, dtype=dtype), "q": torch.randn(R, H, D).to(dtype)},
        **{"keys": keys, "values": values},
        **{"row_seq": torch.tensor(seq), "row_limit": torch.tensor(limit)},
    }


def launch(t: str, given: dict[str, torch.Tensor], chunk: int) -> torch.Tensor:
    R, H, D = given["q"].shape
    lowering = attend.launches(
        **{"rows": {"R": 1}, "heads": H, "groups": given["keys"].shape[2], "size": D},
        **{"positions": L, "dtype": t, "scale": D**-0.5, "arch": 90},
        tiles=Tiles(16, 32, chunk, stages=1),
    )
    run(lowering, given, R=R)
    return given["o"]


def formula(given: dict[str, torch.Tensor]) -> torch.Tensor:
    q, keys, values = (given[n].double() for n in ("q", "keys", "values"))
    shared = q.shape[1] // keys.shape[2]
    out = torch.empty_like(q)
    for r in range(len(q)):
        slot, limit = int(given["row_seq"][r]), int(given["row_limit"][r])
        k = keys[slot, :limit].repeat_interleave(shared, 1)
        v = values[slot, :limit].repeat_interleave(shared, 1)
        p = torch.softmax(torch.einsum("hd,jhd->hj", q[r], k) * q.shape[-1] ** -0.5, -1)
        out[r] = torch.einsum("hj,jhd->hd", p, v)
    return out


@pytest.mark.parametrize("t", ["f32", "bf16"])
@pytest.mark.parametrize(("H", "G", "D"), [(2, 2, 16), (6, 2, 20), (7, 1, 8)])
@pytest.mark.parametrize("chunk", [32, 128])
def test_attend(t: str, H: int, G: int, D: int, chunk: int) -> None:
    given = tensors(t, H, G, D, [0, 0, 0, 1, 1], [37, 37, 37, 64, 1])
    assert_close(launch(t, given, chunk), formula(given), CLOSE[t])


row = st.tuples(st.integers(0, N - 1), st.sampled_from([1, 31, 32, 33, 64, 69, 70]))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(rows=st.lists(row, min_size=1, max_size=10))
def test_any_rows_and_lengths(rows: list[tuple[int, int]]) -> None:
    """Slots in any order within a tile; each row has the bits that it has alone."""
    given = tensors("f32", 2, 1, 16, [s for s, _ in rows], [n for _, n in rows])
    together = launch("f32", given, 32).clone()
    assert_close(together, formula(given), CLOSE["f32"])
    alone = {
        n: v[-1:].clone() if n in ("q", "o", "row_seq", "row_limit") else v
        for n, v in given.items()
    }
    assert torch.equal(launch("f32", alone, 32)[0], together[-1])
