"""The end of an iteration against the policies as torch functions; counters and the loop's flag."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import run

from dcompile.codegen.kernels import commit
from dcompile.policies import Choice, find_policy
from dcompile.policies.base import first_best

MASK, N, L, n = 99, 3, 20, 5


def state(confidence: list[float], masked: list[bool], iteration: int) -> dict[str, torch.Tensor]:
    """Two sequences in slots 2 and 0, at positions that are no run."""
    canvas = torch.randint(0, 50, (N, L))
    seq, pos = torch.tensor([2, 0]), torch.stack([torch.randperm(L)[:n] for _ in range(2)])
    candidate = torch.tensor(masked).view(2, n)
    canvas[seq[:, None], pos] = torch.where(candidate, MASK, canvas[seq[:, None], pos])
    sure = torch.where(candidate, torch.tensor(confidence).view(2, n), -torch.inf)
    return {
        **{"canvas": canvas, "done": torch.zeros(2, dtype=torch.bool), "block_seq": seq},
        **{"committed": torch.zeros(2, n, dtype=torch.bool), "block_pos": pos},
        **{"token": torch.randint(50, 90, (2, n)), "confidence": sure},
        **{"iteration": torch.full((2,), iteration), "entered": torch.tensor([n, 3])},
        **{"threshold": torch.tensor([0.5, 0.9]), "steps": torch.tensor([2.0, 4.0])},
        "tick": torch.tensor([7, 8]),
        **{name: torch.zeros(1, dtype=torch.int32) for name in ("turn", "go")},
        "cap": torch.tensor([4], dtype=torch.int32),
    }


def expected(given: dict[str, torch.Tensor], policy: str) -> tuple[torch.Tensor, ...]:
    """What the traced step does with the choice: the policy, progress, the write."""
    seq, pos = given["block_seq"][:, None], given["block_pos"]
    current, sure = given["canvas"][seq, pos], given["confidence"]
    candidate = current == MASK
    choice = Choice(
        **{"token": given["token"], "confidence": sure, "margin": sure, "entropy": sure},
        **{"candidate": candidate, "filled": ~candidate, "current": current, "position": pos},
        **{"chance": sure, "iteration": given["iteration"], "entered": given["entered"]},
        temperature=given["threshold"],
    )
    wanted = find_policy(policy).commit(choice, given) & candidate
    assert isinstance(wanted, torch.Tensor)
    commits = torch.where(wanted.any(-1)[:, None], wanted, first_best(sure, candidate, pos))
    updated = torch.where(commits, given["token"], current)
    canvas = given["canvas"].clone()
    canvas[seq, pos] = updated
    return canvas, commits, (updated != MASK).all(-1)


def launch(given: dict[str, torch.Tensor], policy: str, loop: bool) -> None:
    lowering = commit.launches(
        **{"sequences": {"B": 1}, "length": n, "positions": L, "mask_id": MASK},
        **{"policy": policy, "loop": loop},
    )
    run(lowering, given, B=2)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    policy=st.sampled_from(sorted(commit.POLICIES)),
    confidence=st.lists(st.sampled_from([0.1, 0.5, 0.5, 0.9, 1.0]), min_size=10, max_size=10),
    masked=st.lists(st.booleans(), min_size=10, max_size=10),
    iteration=st.integers(0, 3),
)
def test_commit(policy: str, confidence: list[float], masked: list[bool], iteration: int) -> None:
    given = state(confidence, masked, iteration)
    canvas, commits, done = expected(given, policy)
    launch(given, policy, loop=False)
    assert torch.equal(given["canvas"], canvas)
    assert torch.equal(given["committed"], commits) and torch.equal(given["done"], done)
    assert given["iteration"].tolist() == [iteration] * 2, "the host counts"


@pytest.mark.parametrize("cap", [2, 20])
def test_the_loop_ends_by_its_flag_or_its_cap(cap: int) -> None:
    given = state([0.1 * i for i in range(10)], [True] * 5 + [False, True, True, False, False], 0)
    given["cap"][0] = cap
    given["threshold"][:] = 2.0  # one token a turn
    turns = 0
    while True:
        place = given["block_seq"][:, None], given["block_pos"]
        given["confidence"][given["canvas"][place] != MASK] = -torch.inf  # as the choice has it
        launch(given, "threshold", loop=True)
        turns += 1
        if not given["go"]:
            break
    assert turns == int(given["turn"]) == min(cap, 5)
    assert given["iteration"].tolist() == [turns, min(turns, 2)], (
        "a finished sequence counts no more"
    )
    assert given["tick"].tolist() == [7 + turns, 8 + min(turns, 2)]
    assert given["done"].tolist() == [cap >= 5, True]
