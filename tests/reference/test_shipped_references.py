"""Whole generations with the shipped, trained model against the slow references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference_managers as reference
import torch
from quick import compile_quickly
from reference_managers import Facts, Logits

from dcompile.demo import MODEL, heldout
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner

LENGTH = 16


@pytest.mark.parametrize(
    ("policy", "manager", "block"),
    [
        ("hierarchical", "blockwise", 8),
        ("factor", "blockwise", 8),
        ("credit", "blockwise", 8),
        ("maskgit_plus", "canvas", LENGTH),
    ],
)
def test_the_shipped_model_decodes_as_the_reference(
    policy: str, manager: str, block: int, tmp_path: Path
) -> None:
    options = Options(
        max_length=96, batch=2, block_length=block, policy=policy, manager=manager, cache="none"
    )
    runner = Runner.load(compile_quickly(MODEL, options, tmp_path / "model.dcx"))
    checkpoint = open_checkpoint(MODEL)
    module, spec = checkpoint.reference(), checkpoint.spec

    def model(ids: list[int]) -> Logits:
        with torch.no_grad():
            return np.asarray(module(torch.tensor([ids]))[0].float())

    knobs = runner.limits.parameters | ({"steps": 6.0} if manager == "canvas" else {})
    facts = Facts(spec.mask_id, frozenset(spec.eos_ids), block)
    decode = reference.canvas if manager == "canvas" else reference.blockwise
    asked = {"steps": 6} if manager == "canvas" else {}
    prompts = [runner.encode(example.prompt) for example in heldout()[::60]]
    for prompt, result in zip(
        prompts, runner.generate(prompts, gen_length=LENGTH, **asked), strict=True
    ):
        made = decode(model, prompt, LENGTH, facts, policy, knobs)
        assert (result.all_tokens, result.forwards) == (made.tokens, made.forwards)
