"""Iterations without the host: the same tokens and counts however seldom anyone looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from toy import CACHES, Toy, prompts_of

from dcompile.runtime.cpu.executor import Executor
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.turns import repeat


@given(
    ends=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    limit=st.integers(1, 12),
    every=st.integers(1, 5),
    asked=st.integers(1, 20),
)
def test_turns_are_counted_until_each_sequence_is_done(
    ends: list[int], limit: int, every: int, asked: int
) -> None:
    turn = 0
    wanted = np.zeros(1, np.int32)
    clock = np.full(len(ends), 100)

    def step() -> np.ndarray:
        nonlocal turn
        turn += 1
        wanted[0] |= turn == asked
        assert clock.tolist() == [99 + min(turn, end) for end in ends]
        return np.array([turn >= end for end in ends])

    turns = repeat(step, {"iteration": clock}, limit, every, wanted)
    first = min(*ends, asked)
    assert turn == min(limit, first + -first % every)
    assert turns.performed == [min(turn, end) for end in ends]
    assert turns.done == [turn >= end for end in ends]


@pytest.mark.parametrize("case", CACHES, ids=str)
def test_looking_seldom_changes_nothing(case: Toy, tmp_path: Path, code: bytes) -> None:
    case = Toy(**{**vars(case), "batch": 2})
    runner = toy.load(tmp_path, case, code)
    prompts = prompts_of(5, [3, 9, 0, 4])
    positions = max(12, case.block)
    found = []
    for every in (1, 2, 3, 7):
        runner = Runner(runner.artifact, Executor(runner.artifact, check_every=every))
        results = runner.generate(
            prompts, gen_length=positions, threshold=0.7, temperature=0.5, seed=3
        )
        found.append([(r.all_tokens, r.forwards) for r in results])
    assert all(f == found[0] for f in found[1:])
    assert len({forwards for _, forwards in found[0]}) > 1
