"""Which policies, managers and caches go together, and that the compiler says so before it writes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from dcompile.decoding.rules import CACHES, MANAGERS, RULES, Combination, allowed, refused
from dcompile.driver.compile import compile_checkpoint, compile_module
from dcompile.errors import OptionError
from dcompile.options import Options
from dcompile.policies import Policy, find_policy, policy_names


@dataclass(frozen=True)
class Blocks:
    block_length: int | None


BOTH, CAUSAL = Blocks(None), Blocks(8)


def test_every_policy_has_a_cell_with_each_kind_of_model() -> None:
    for policy in policy_names():
        assert allowed(policy, "blockwise", "none", BOTH) is None
        assert allowed(policy, "blockwise", "block", CAUSAL) is None


@pytest.mark.parametrize(
    ("policy", "manager", "cache", "spec", "word"),
    [
        ("threshold", "blockwise", "block", BOTH, "both directions"),
        ("threshold", "blockwise", "dual", CAUSAL, "exactly"),
        ("edit", "blockwise", "active", BOTH, "decided positions"),
        ("remask", "canvas", "active", BOTH, "decided positions"),
        ("entropy", "canvas", "none", CAUSAL, "not all at once"),
        ("likelihood", "canvas", "none", BOTH, "scores"),
    ],
)
def test_the_reason_is_said(policy: str, manager: str, cache: str, spec: Blocks, word: str) -> None:
    reason = allowed(policy, manager, cache, spec)
    assert reason is not None and word in reason


def test_unknown_names_are_refused() -> None:
    for names in (("best", "blockwise", "none"), ("steps", "x", "none"), ("steps", "canvas", "x")):
        with pytest.raises(OptionError):
            allowed(*names, BOTH)


def test_every_rule_is_needed() -> None:
    """Each refuses a combination that no other rule does."""
    policies = [find_policy(name) for name in policy_names()]
    plain = Policy("plain", lambda choice, parameters: choice.candidate)
    combinations = [
        Combination(*c)
        for c in product(
            [*policies, plain],
            MANAGERS,
            CACHES,
            (None, 8),
            (False, True),
            (None, False, True),
            (True, False),
            (False, True),
        )
    ]
    alone = set()
    for combination in combinations:
        broken = [rule for rule in RULES if rule.applies(combination)]
        assert (refused(combination) is None) == (not broken)
        if len(broken) == 1:
            alone.add(broken[0].reason)
    assert alone == {rule.reason for rule in RULES}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_checkpoint(root / name, name) for name in ("llada_moe", "sdar", "dream")}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llada_moe", {"cache": "active", "policy": "edit"}),
        ("llada_moe", {"manager": "canvas"}),
        ("llada_moe", {"manager": "canvas", "block_length": 16, "aligned": True}),
        ("llada_moe", {"manager": "rows"}),
        ("llada_moe", {"smoothing": 1.5}),
        ("dream", {"smoothing": 0.3}),
        ("sdar", {"manager": "canvas", "block_length": 32}),
        ("sdar", {"aligned": False}),
    ],
)
def test_the_compiler_refuses(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, options: dict[str, object]
) -> None:
    with pytest.raises(OptionError):
        compile_checkpoint(checkpoints[family], Options(**options), tmp_path / "m.dcx")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_module_is_refused_once_its_mask_is_known(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11))
    options = Options(mask_id=10, max_length=32, block_length=8, policy="edit", cache="active")
    with pytest.raises(OptionError, match="decided positions"):
        compile_module(module, options, tmp_path / "m.dcx")
