"""Every policy against its reference, position by position, on identical logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from drawn import KNOBS, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_policies import REFERENCES, Memory, Seen, choose, iterate

from dcompile.decoding.rules import allowed
from dcompile.ir import operators
from dcompile.ir.operators import noise
from dcompile.policies import Policy, find_policy, policy_names
from dcompile.step.choose import Blocks, write_tokens
from dcompile.step.plain_decode import fresh_state

VOCAB, MASK = 11, 4
NAMES = [name for name in REFERENCES if name != "likelihood"]


def policy_of(name: str) -> Policy:
    base, _, score = name.partition(" ")
    return find_policy(base, score or None)


def test_every_policy_has_a_reference() -> None:
    assert {name.partition(" ")[0] for name in REFERENCES} == set(policy_names())


@dataclass(frozen=True)
class Blocked:
    block_length: int | None


@dataclass(frozen=True)
class Situation:
    """A block, and the logits of the iterations to come."""

    current: list[int]
    prompt: int
    logits: list[np.ndarray]  # [n, V] each
    knobs: dict[str, float]
    iteration: int
    seed: int


@st.composite
def situations(draw: st.DrawFn, policy: Policy) -> Situation:
    n = draw(st.integers(1, 7))
    token = st.integers(0, VOCAB - 1)
    # Runs of masks, and a prompt that may reach into the block.
    current = draw(st.lists(st.one_of(st.just(MASK), st.just(MASK), token), min_size=n, max_size=n))
    prompt = draw(st.integers(0, n - 1))
    current = [0 if i < prompt and v == MASK else v for i, v in enumerate(current)]
    if MASK not in current:
        current[-1] = MASK  # no block is entered without one
    return Situation(
        current,
        prompt,
        draw(st.lists(rows(n), min_size=1, max_size=4)),
        {name: draw(KNOBS[name]) for name in policy.parameters},
        draw(st.integers(0, 3)),
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_policy_is_its_reference(name: str, data: st.DataObject) -> None:
    policy = policy_of(name)
    s = data.draw(situations(policy))
    pipelined = allowed(policy, "pipelined", "block", Blocked(8)) is None
    full = not pipelined or data.draw(st.booleans())
    n, memory = len(s.current), Memory()
    state = {**fresh_state(policy, n, "request"), **fresh_state(policy, n, "block")}
    current, entered = list(s.current), s.current.count(MASK)
    for turn, logits in enumerate(s.logits):
        blocks = Blocks(
            current=torch.tensor([current]),
            position=torch.arange(20, 20 + n)[None],
            iteration=torch.tensor([s.iteration + turn]),
            entered=torch.tensor([entered]),
            temperature=torch.zeros(1),
            seed=torch.tensor([s.seed]),
            tick=torch.tensor([turn]),
            prompt_end=torch.tensor([20 + s.prompt]),
            full=torch.tensor([int(full)]) if pipelined else None,
        )
        values = {name: torch.tensor([value]) for name, value in s.knobs.items()}
        z = torch.tensor(logits, dtype=torch.float32)[None]
        written = write_tokens(policy, MASK, z, blocks, values, state)
        seen = seen_of(s, logits, blocks, z)
        wanted, done = iterate(name, seen, s.knobs, memory, full)
        if name == "credit" and close_call(memory["confidence"], s.knobs["threshold"]):
            return
        assert written.updated[0].tolist() == wanted
        assert bool(written.done[0]) == done
        if done:
            return
        current, state = wanted, dict(written.state)


def seen_of(s: Situation, logits: np.ndarray, blocks: Blocks, z: torch.Tensor) -> Seen:
    """The step's own numbers: that they are right is another test, ties must be the same ones."""
    everywhere = torch.ones(1, len(s.current), dtype=torch.bool)
    clock = (blocks.temperature, blocks.seed, blocks.tick, blocks.position)
    token, confidence, margin, entropy = (
        x[0].numpy() for x in operators.CHOOSE(z, everywhere, *clock, MASK)
    )
    chance = noise.uniform(blocks.seed[:, None], blocks.tick[:, None], blocks.position)
    return Seen(
        logits=logits,
        token=token.tolist(),
        confidence=list(confidence),
        margin=list(margin),
        entropy=list(entropy),
        chance=list(chance[0].numpy()),
        current=blocks.current[0].tolist(),
        mask_id=MASK,
        generated=[i >= s.prompt for i in range(len(s.current))],
        iteration=int(blocks.iteration[0]),
        entered=int(blocks.entered[0]),
    )


def close_call(confidence: dict[int, Any], tau: float) -> bool:
    """Whether rounding may decide: credit's sparse and whole forms add up in another order."""
    if not confidence:
        return False
    best = float(max(confidence.values()))
    near = [c for c in confidence.values() if abs(float(c) - min(tau, best)) < 4e-6]
    return len(near) > (best < tau - 4e-6)  # the best itself, where it is below the threshold


@settings(max_examples=60, deadline=None)
@given(z=rows(5))
def test_the_choice_is_its_reference(z: np.ndarray) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    live = torch.ones(1, 5, dtype=torch.bool)
    at = torch.arange(5)[None]
    found = operators.CHOOSE(
        torch.tensor(z, dtype=torch.float32)[None], live, one.float(), one, one, at, MASK
    )
    wanted = choose(z, MASK)
    assert found[0][0].tolist() == wanted[0]
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(mine[0].numpy(), np.array(theirs), rtol=3e-6, atol=3e-6)
