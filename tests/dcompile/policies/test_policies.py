"""A user's policy is traced and fused as ours are; what policies remember is small."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from quick import compile_quickly

from dcompile.errors import OptionError
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.policies import find_policy, policy_names
from dcompile.runtime.decode.loop import Runner
from dcompile.step.choose import Blocks, write_tokens
from dcompile.step.plain_decode import fresh_state, plain_decode

EXAMPLE = Path(__file__).parents[3] / "docs" / "my_policy.py"
MASK = 5


def test_the_example_is_compiled_into_the_step(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "llada_moe")
    policy = f"{EXAMPLE}:steady"
    options = Options(max_length=64, block_length=8, cache="none", policy=policy)
    runner = Runner.load(compile_quickly(folder, options, tmp_path / "model.dcx"))
    plan = runner.artifact.plan
    assert all(launch.native for launch in plan.launches), "nothing is left to torch"
    assert {"threshold_steady"} <= set(plan.inputs) and "last" in plan.state
    knobs = {"threshold": 0.08, "threshold_steady": 0.03}
    checkpoint = open_checkpoint(folder)
    forwards = []
    for prompt in ([1, 2, 3], [7] * 9):
        (result,) = runner.generate([prompt], gen_length=16, early_stop=False, **knobs)
        plain = plain_decode(
            checkpoint.reference(),
            checkpoint.spec,
            prompt,
            16,
            8,
            policy,
            early_stop=False,
            **knobs,
        )
        assert (result.all_tokens, result.forwards) == (plain.tokens, plain.forwards)
        forwards.append(result.forwards)
    assert min(forwards) < 16, "some forwards commit more than one token"


def test_a_function_will_do() -> None:
    policy = find_policy(f"{EXAMPLE}:sure")
    assert policy.name == "sure" and not policy.parameters and not policy.state


def test_what_is_no_policy_is_refused() -> None:
    for name in ("nothing", "torch"):
        with pytest.raises(OptionError, match="no policy named"):
            find_policy(f"{EXAMPLE}:{name}")


@pytest.mark.parametrize("name", policy_names())
@pytest.mark.parametrize("n", [1, 8, 32, 64, 256, 1024])
def test_memory_is_at_most_a_mebibyte_a_block(name: str, n: int) -> None:
    """Whatever the vocabulary: a matrix of credits would be 40 MB for 64 positions of 157184 tokens."""
    held = find_policy(name).state.values()
    size = sum(prod(s.shape(n)) * torch.empty(0, dtype=s.dtype).itemsize for s in held)
    assert size <= 1 << 20


@pytest.mark.parametrize("name", ["threshold", "edit", "remask", "credit", "d2f"])
def test_where_none_is_sure_the_best_commits_alone(name: str) -> None:
    """However close the others are; the lowest position at an exact tie."""
    scale = torch.tensor([1.0, 1 + 2e-6, 1 + 4e-6, 1 + 4e-6])
    logits = scale[:, None] * torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert iterate(name, logits, [MASK] * 4) == [MASK, MASK, 0, MASK]


def test_dynamic_shares_out_the_length_of_the_block() -> None:
    """Four in two steps are two a step, although half of the block is the prompt's."""
    logits = torch.arange(1.0, 5.0)[:, None] * torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert iterate("dynamic", logits, [7, 7, MASK, MASK], steps=2.0) == [7, 7, 0, 0]
    assert iterate("dynamic", logits, [7, 7, 7, MASK], steps=2.0) == [7, 7, 7, 0]


@pytest.mark.parametrize(("name", "first"), [("entropy", 0), ("margin", 1), ("maskgit_plus", 2)])
def test_idle_steps_of_a_schedule_are_left_out(name: str, first: int) -> None:
    """With more steps than masks one commits, and it is the first by the policy's own score."""
    p = torch.tensor(
        [
            [0.50, 0.49, 0.01, 0.00, 0.00],  # the least entropy
            [0.48, 0.13, 0.13, 0.13, 0.13],  # the widest margin
            [0.60, 0.30, 0.04, 0.03, 0.03],  # the most confident
        ]
    )
    logits = torch.cat((p.clamp_min(1e-9).log(), torch.full((3, 1), -30.0)), 1)
    wanted = [0 if i == first else MASK for i in range(3)]
    assert iterate(name, logits, [MASK] * 3, steps=512.0) == wanted


def iterate(name: str, logits: torch.Tensor, current: list[int], **knobs: float) -> list[int]:
    """A first iteration of a block of logits [n, V]: its tokens after it."""
    policy, n = find_policy(name), len(current)
    zero = torch.zeros(1, dtype=torch.int64)
    ids = torch.tensor([current])
    blocks = Blocks(
        current=ids,
        position=torch.arange(n)[None],
        iteration=zero,
        entered=(ids == MASK).sum(-1),
        temperature=zero.float(),
        seed=zero,
        tick=zero,
        prompt_end=zero,
    )
    values = {name: torch.tensor([value]) for name, value in (policy.parameters | knobs).items()}
    state = fresh_state(policy, n, "request") | fresh_state(policy, n, "block")
    written = write_tokens(policy, MASK, logits[None], blocks, values, state)
    found: list[int] = written.updated[0].tolist()
    return found


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [("x = 1\nraise ValueError('no')\n", 2, "ValueError: no"), ("x = (\n", 1, "SyntaxError")],
)
def test_a_file_that_fails_is_named_with_its_line(
    text: str, line: int, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(OptionError, match=words) as caught:
        find_policy(f"{file}:x")
    assert caught.value.where == f"{file}:{line}"
