"""What holds of every cache policy at every moment, and the names of options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcompile.errors import OptionError
from dcompile.runtime.decode import caches
from dcompile.runtime.decode.caches import Moment, cache_policy

BOTH = ["none"]
BIDIRECTIONAL = ["prefix", "dual", "vicinity", "periodic", "active"]
MASK = 9


@given(
    name=st.sampled_from([*BOTH, *BIDIRECTIONAL, "block"]),
    begin=st.integers(0, 40),
    n=st.sampled_from([4, 8]),
    more=st.integers(0, 3),
    iteration=st.integers(0, 5),
    earlier=st.integers(0, 9),
    look=st.integers(0, 50),
    shift=st.integers(0, 1),
    data=st.data(),
)
def test_the_block_runs_and_the_first_iteration_leaves_nothing_out(
    name: str,
    begin: int,
    n: int,
    more: int,
    iteration: int,
    earlier: int,
    look: int,
    shift: int,
    data: st.DataObject,
) -> None:
    span = 4 if name == "block" else None
    begin -= begin % n if span else 0
    previous = begin - n if earlier and begin >= n else None
    options = {"cache": name, "look_back": look, "look_ahead": look, "refresh_every": look + 1}
    total = begin + n * (more + 1)
    tick = iteration + earlier
    block = st.lists(st.sampled_from([1, MASK]), min_size=n, max_size=n)
    ids = np.array(data.draw(block.filter(lambda drawn: MASK in drawn)))
    before = np.where(data.draw(block), MASK, ids)
    at = Moment(begin, begin + n, total, iteration, tick, previous, span, ids, before, MASK, shift)
    rows = cache_policy(options, span)(at)
    if tick == 0:
        assert rows == (0, begin + n if span else total)
    if isinstance(rows, tuple):
        first, last = rows
        assert 0 <= first <= begin and begin + n <= last <= total
    else:
        assert iteration > 0 and len(rows) % 8 == 0 and (np.diff(rows) >= 0).all()
        open_ = {begin + i for i in range(n) if ids[i] == MASK}
        changed = {begin + i for i in range(n) if ids[i] != before[i]}
        assert set(rows.tolist()) == open_ | changed | {max(p - shift, 0) for p in open_}


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_block_causal_models_take_no_approximation(name: str) -> None:
    with pytest.raises(OptionError, match="use block"):
        cache_policy({"cache": name}, 4)


def test_none_is_the_default() -> None:
    assert cache_policy({}, None) is caches.none
    assert cache_policy({}, 4) is caches.none


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "vicinity", "look_back": -1},
        {"cache": "vicinity", "look_ahead": 1.5},
        {"cache": "vicinity", "warmup": True},
        {"cache": "periodic", "refresh_every": 0},
        {"cache": 3},
        {"cache": None},
    ],
)
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        cache_policy(options, None)
