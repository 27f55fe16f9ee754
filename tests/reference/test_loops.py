"""Every policy under every manager with any logits: it ends in time, and is the slow reference.

The loop and the policies are the real ones, the model is a table of drawn logits.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import reference_managers as reference
import torch
from drawn import KNOBS, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from imagined import imagined
from reference_managers import Facts, Made

from dcompile.decoding.rules import MANAGERS, allowed
from dcompile.ir import operators
from dcompile.policies import find_policy, policy_names
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result

VOCAB, MASK, EOS, BLOCK, LENGTH = 11, 4, 2, 4, 40


@dataclass(frozen=True)
class Blocks:
    block_length: int | None


PAIRS = [
    (policy, manager, span)
    for policy, manager, span in product(policy_names(), MANAGERS, (None, BLOCK))
    if allowed(policy, manager, "none" if span is None else "block", Blocks(span)) is None
]
# Rounding decides where sums are added in another order, or the reference has no noise.
INEXACT = {"credit", "likelihood"}


def test_every_policy_and_manager_is_here() -> None:
    assert {policy for policy, _, _ in PAIRS} == set(policy_names())
    assert {manager for _, manager, _ in PAIRS} == set(MANAGERS)


@dataclass(frozen=True)
class Bank:
    """Logits as a function of what a position sees: a hash picks one of the drawn rows."""

    rows: np.ndarray  # [K, V]
    span: int | None

    def __call__(self, seen: list[int], position: int) -> np.ndarray:
        key = zlib.crc32(bytes([*seen, position]))
        return self.rows[key % len(self.rows)]

    def whole(self, x: list[int]) -> np.ndarray:
        """Logits [T, V] of a sequence, as the reference asks for them."""
        ends = [
            len(x) if self.span is None else (i // self.span + 1) * self.span for i in range(len(x))
        ]
        return np.array([self(x[:end], i) for i, end in enumerate(ends)])


@dataclass(frozen=True)
class Asked:
    bank: Bank
    prompts: list[list[int]]
    gen_length: int
    early_stop: bool
    knobs: dict[str, float]
    batch: int
    most: int


@st.composite
def requests(draw: st.DrawFn, policy: str, manager: str, span: int | None) -> Asked:
    token = st.integers(0, VOCAB - 1).filter(lambda v: v != MASK)
    prompts = draw(st.lists(st.lists(token, max_size=9), min_size=1, max_size=3))
    blocks = 1 if manager == "canvas" else draw(st.integers(1, 4))
    knobs = {name: draw(KNOBS[name]) for name in find_policy(policy).parameters}
    if manager == "pipelined":
        share = st.sampled_from([0.1, 0.5, 1.0])
        knobs |= {"tau_add": draw(share), "tau_activate": draw(share)}
    extra = draw(st.integers(0, 3)) if span is not None else 0
    return Asked(
        Bank(draw(rows(6)), span),
        prompts,
        blocks * BLOCK + extra,
        draw(st.booleans()),
        knobs,
        draw(st.integers(1, 2)),
        draw(st.integers(1, 4)),
    )


def runner_of(policy: str, manager: str, span: int | None, asked: Asked, **more: Any) -> Runner:
    return imagined(
        find_policy(policy),
        asked.bank,
        vocab=VOCAB,
        mask_id=MASK,
        eos_ids=(EOS,),
        block=BLOCK,
        length=LENGTH,
        batch=asked.batch,
        span=span,
        manager=manager,
        max_blocks=asked.most,
        cache="none" if span is None else "block",
        **more,
    )


def serve(
    runner: Runner, asked: Asked, prompts: Sequence[list[int]]
) -> list[tuple[list[int], int]]:
    results: list[Result] = runner.generate(
        prompts, gen_length=asked.gen_length, early_stop=asked.early_stop, **asked.knobs
    )
    return [(r.all_tokens, r.forwards) for r in results]


def slow(policy: str, manager: str, span: int | None, asked: Asked, prompt: list[int]) -> Made:
    facts = Facts(
        MASK, frozenset([EOS]), BLOCK, aligned=span is not None, early_stop=asked.early_stop
    )
    asking = (asked.bank.whole, prompt, asked.gen_length, facts, policy, asked.knobs)
    if manager == "pipelined":
        return reference.pipelined(*asking, asked.most)
    return (reference.canvas if manager == "canvas" else reference.blockwise)(*asking)


def same_numbers(z: np.ndarray, mask_id: int) -> tuple[list[int], list[Any], list[Any], list[Any]]:
    """The step's own choice, so that ties are the same ones; that it is right is another test."""
    one = torch.zeros(1, dtype=torch.int64)
    live, at = torch.ones(1, len(z), dtype=torch.bool), torch.arange(len(z))[None]
    logits = torch.tensor(np.asarray(z), dtype=torch.float32)[None]
    found = operators.CHOOSE(logits, live, one.float(), one, one, at, mask_id)
    return tuple(list(x[0].numpy()) for x in found)  # type: ignore[return-value]


@pytest.mark.parametrize(("policy", "manager", "span"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_it_ends_in_time_and_is_the_reference(
    policy: str, manager: str, span: int | None, data: st.DataObject
) -> None:
    asked = data.draw(requests(policy, manager, span))
    runner = runner_of(policy, manager, span, asked)
    served = serve(runner, asked, asked.prompts)
    for prompt, (tokens, forwards) in zip(asked.prompts, served, strict=True):
        assert MASK not in tokens and len(tokens) == asked.gen_length
        total = runner.limits.total(len(prompt), asked.gen_length)
        blocks = (total - runner.limits.begin(len(prompt))) // BLOCK
        assert forwards <= total - len(prompt) + blocks * int(asked.knobs.get("post_steps", 0))
    if policy not in INEXACT:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "choose", same_numbers)
            for prompt, result in zip(asked.prompts, served, strict=True):
                made = slow(policy, manager, span, asked, prompt)
                assert result == (made.tokens, made.forwards)
    # Nothing is left of a request, whatever was served before it and beside it.
    alone = [serve(runner_of(policy, manager, span, asked), asked, [p])[0] for p in asked.prompts]
    assert alone == served
    assert serve(runner, asked, asked.prompts[::-1]) == served[::-1]


@pytest.mark.parametrize("policy", ["threshold", "credit", "edit", "remask"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_looking_seldom_changes_nothing(policy: str, data: st.DataObject) -> None:
    """Iterations that the host did not have to wait for change no result, of policies with state either."""
    asked = data.draw(requests(policy, "blockwise", None))
    every = data.draw(st.integers(2, 6))
    found = [
        serve(runner_of(policy, "blockwise", None, asked, check_every=k), asked, asked.prompts)
        for k in (1, every)
    ]
    assert found[0] == found[1]
