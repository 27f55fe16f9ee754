"""What is settled has nothing open: names are found, numbers known, and readings remembered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dcompile.driver.settle import PIPELINE, settle
from dcompile.errors import OptionError
from dcompile.frontends.base import Defaults, ModelSpec
from dcompile.options import Options, WatchedOptions

MODULE = ModelSpec(
    family="module",
    vocab_size=0,
    mask_id=7,
    eos_ids=(),
    max_positions=None,
    block_length=None,
    shift=False,
    dtype=torch.bfloat16,
    layer_kinds=(),
    defaults=Defaults(),
)
BLOCK_CAUSAL = replace(
    MODULE,
    block_length=4,
    layer_kinds=("dense",),
    defaults=Defaults(4, "block", threshold=0.85, tuned_for=("threshold", "dynamic")),
)


def test_what_nobody_said_is_the_family_s() -> None:
    settled = settle(Options(target="cuda"), MODULE)
    assert (settled.shape.positions, settled.shape.block_length) == (2048, 32)
    assert settled.shape.dtype is torch.bfloat16 and settled.shape.mask_id == 7
    assert settled.policy.name == "threshold" and settled.combination.cache == "none"
    assert settled.parameters == settled.policy.parameters
    wanted = {
        **{"dtype": "bfloat16", "target": "cuda:sm_80,sm_90", "policy": "threshold"},
        **{"cache": "none", "max_length": 2048, "block_length": 32},
    }
    assert settled.options.record() == {**Options().record(), **wanted}


def test_what_was_said_stays() -> None:
    said = Options(
        dtype="float32", max_length=64, block_length=16, policy="steps", score="margin", batch=3
    )
    settled = settle(said, MODULE)
    assert settled.options.record() == {**said.record(), "target": "cpu", "cache": "none"}
    assert settled.shape.slots == 3 and settled.parameters["steps"] == 16.0


@pytest.mark.parametrize(("policy", "reached"), [("dynamic", True), ("hierarchical", False)])
def test_a_family_s_threshold_reaches_what_it_is_tuned_for(policy: str, reached: bool) -> None:
    settled = settle(Options(policy=policy, max_length=64), BLOCK_CAUSAL)
    own = settled.policy.parameters["threshold"]
    assert own != 0.85 and settled.parameters["threshold"] == (0.85 if reached else own)


def test_a_pipeline_has_its_own_parameters_and_all_blocks() -> None:
    settled = settle(Options(manager="pipelined", policy="d2f", max_length=62), BLOCK_CAUSAL)
    assert PIPELINE.items() <= settled.parameters.items() and settled.shape.blocks == 16
    few = Options(manager="pipelined", policy="d2f", max_length=62, max_blocks=3)
    assert settle(few, BLOCK_CAUSAL).shape.blocks == 3


def test_a_policy_that_nobody_has_is_refused_for_a_module_too() -> None:
    with pytest.raises(OptionError, match="no policy named"):
        settle(Options(policy="best"), MODULE)


@pytest.mark.parametrize(
    ("given", "unread"), [({}, True), ({"manager": "pipelined", "policy": "d2f"}, False)]
)
def test_an_option_is_read_where_it_says_something(given: dict[str, str], unread: bool) -> None:
    options = WatchedOptions.of(replace(Options(max_length=64), **given))  # type: ignore[arg-type]
    settled = settle(options, BLOCK_CAUSAL)
    assert ("max_blocks" in options.unread) == unread
    assert {"moe_overflow", "look_back", "threads"} <= set(options.unread)
    assert settled.options.skip == () and "skip" not in options.unread
