"""Whole generations of compiled artifacts against the slow references: every manager, many policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference_managers as reference
import torch
from checkpoints import write_checkpoint
from quick import compile_quickly
from reference_managers import Facts, Held, Logits, Made, Model, SoftModel

from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result

LENGTH = 16
ENDS = tuple(range(0, 128, 24))
# Of an empty prompt, all positions would be equally sure but for rounding.
PROMPTS = [[8], [1, 2, 3, 4, 5], [7] * 11, [3, 1, 4, 1, 5, 9, 2, 6]]
Compiled = Callable[..., tuple[Runner, Any, Facts]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    made: dict[Any, Any] = {}

    def build(family: str, **options: Any) -> tuple[Runner, Any, Facts]:
        key = (family, *sorted(options.items()))
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            config = {"block_length": 8} if family == "sdar" else {}
            folder = write_checkpoint(root / "checkpoint", family, **config)
            facts: dict[str, Any] = {"max_length": 64, "batch": 3, "eos_ids": ENDS, **options}
            facts.setdefault("block_length", 8)
            artifact = compile_quickly(folder, Options(**facts), root / "model.dcx")
            checkpoint = open_checkpoint(folder)
            spec = checkpoint.spec
            known = Facts(
                spec.mask_id,
                frozenset(ENDS),
                facts["block_length"],
                aligned=facts.get("aligned", spec.block_length is not None),
                shift=spec.shift,
            )
            module = checkpoint.reference()
            soft = "smoothing" in options
            model = soft_model_of(module) if soft else model_of(module)
            made[key] = Runner.load(artifact), model, known
        return made[key]

    return build


def model_of(module: torch.nn.Module) -> Model:
    def logits(ids: list[int]) -> Logits:
        with torch.no_grad():
            return np.asarray(module(torch.tensor([ids]))[0].float())

    return logits


def soft_model_of(module: torch.nn.Module) -> tuple[SoftModel, Any]:
    """The same with something added to embeddings, and the table of those."""
    table = module.get_parameter("embed_tokens.weight").detach()

    def logits(ids: list[int], held: Held) -> Logits:
        def add(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
            for position, vector in held.items():
                out[0, position] += torch.from_numpy(vector)
            return out

        handle = module.get_submodule("embed_tokens").register_forward_hook(add)
        try:
            return model_of(module)(ids)
        finally:
            handle.remove()

    return logits, table.float().numpy()


def same(results: list[Result], wanted: list[Made]) -> None:
    for result, made in zip(results, wanted, strict=True):
        assert (result.all_tokens, result.forwards) == (made.tokens, made.forwards)


POLICIES: list[tuple[str, dict[str, float]]] = [
    ("threshold", {"threshold": 0.04}),
    ("steps", {"steps": 5}),
    ("factor", {"factor": 3.95}),
    ("hierarchical", {"threshold": 0.06, "threshold_low": 0.03}),
    ("credit", {"threshold": 0.05, "alpha": 0.9}),
    ("dynamic", {"threshold": 0.04, "steps": 6}),
    ("edit", {"threshold": 0.04, "threshold_edit": 0.05, "post_steps": 3}),
    ("remask", {"threshold": 0.04, "threshold_remask": 0.03}),
    ("entropy", {"steps": 7}),
    ("margin", {"steps": 7}),
    ("maskgit_plus", {"steps": 7}),
    ("d2f", {"threshold": 0.04}),
]


@pytest.mark.parametrize(("policy", "knobs"), POLICIES, ids=[name for name, _ in POLICIES])
def test_blockwise_without_a_cache(
    compiled: Compiled, policy: str, knobs: dict[str, float]
) -> None:
    runner, model, facts = compiled("llada_moe", policy=policy, cache="none")
    results = runner.generate(PROMPTS, gen_length=LENGTH, **knobs)
    whole = {**runner.limits.parameters, **knobs}
    same(results, [reference.blockwise(model, p, LENGTH, facts, policy, whole) for p in PROMPTS])


@pytest.mark.parametrize("policy", ["entropy"])
def test_the_whole_canvas(compiled: Compiled, policy: str) -> None:
    runner, model, facts = compiled(
        "dream", policy=policy, cache="none", manager="canvas", block_length=LENGTH
    )
    knobs = dict(POLICIES)[policy]
    results = runner.generate(PROMPTS, gen_length=LENGTH, **knobs)
    whole = {**runner.limits.parameters, **knobs}
    same(results, [reference.canvas(model, p, LENGTH, facts, policy, whole) for p in PROMPTS])


@pytest.mark.parametrize(
    ("policy", "cross_block"), [("threshold", True), ("threshold", False), ("credit", True)]
)
def test_blocks_kept(compiled: Compiled, policy: str, cross_block: bool) -> None:
    """Cache `block` is the uncached decode; a forward of its own for each stored block adds one."""
    runner, model, facts = compiled("sdar", policy=policy, cache="block", cross_block=cross_block)
    knobs = dict(POLICIES)[policy]
    whole = {**runner.limits.parameters, **knobs}
    results = runner.generate(PROMPTS, gen_length=24, early_stop=False, **knobs)
    still = Facts(**{**vars(facts), "early_stop": False})
    for prompt, result in zip(PROMPTS, results, strict=True):
        made = reference.blockwise(model, prompt, 24, still, policy, whole)
        blocks = (len(made.x) - len(prompt) // 8 * 8) // 8
        assert result.all_tokens == made.tokens
        assert result.forwards == made.forwards + (0 if cross_block else blocks - 1)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(("max_blocks", "cache"), [(None, "block"), (2, "block"), (None, "none")])
def test_pipelined_blocks(
    compiled: Compiled, max_blocks: int | None, cache: str, early_stop: bool
) -> None:
    options: dict[str, Any] = {"cache": cache, "max_blocks": max_blocks, "manager": "pipelined"}
    runner, model, facts = compiled("sdar", policy="d2f", **options)
    facts = Facts(**{**vars(facts), "early_stop": early_stop})
    for knobs in (
        {"threshold": 0.05},
        {"threshold": 0.03, "tau_add": 0.5, "tau_activate": 0.6},
        {"threshold": 0.1, "tau_add": 1.0, "tau_activate": 1.0},
    ):
        results = runner.generate(PROMPTS, gen_length=29, early_stop=early_stop, **knobs)
        whole = {**runner.limits.parameters, **knobs}
        most = max_blocks or 99
        same(
            results,
            [reference.pipelined(model, p, 29, facts, "d2f", whole, most) for p in PROMPTS],
        )


@pytest.mark.parametrize("policy", ["dynamic"])
def test_pipelined_with_other_policies(compiled: Compiled, policy: str) -> None:
    runner, model, facts = compiled("sdar", policy=policy, cache="block", manager="pipelined")
    knobs = dict(POLICIES)[policy]
    whole = {**runner.limits.parameters, **knobs}
    results = runner.generate(PROMPTS, gen_length=32, **knobs)
    same(results, [reference.pipelined(model, p, 32, facts, policy, whole, 99) for p in PROMPTS])


def test_a_pipeline_of_one_block_is_blockwise(compiled: Compiled) -> None:
    one, _, _ = compiled(
        "sdar", policy="threshold", cache="block", manager="pipelined", max_blocks=1
    )
    plain, _, _ = compiled("sdar", policy="threshold", cache="block")
    asked = {"gen_length": 32, "threshold": 0.05}
    for a, b in zip(one.generate(PROMPTS, **asked), plain.generate(PROMPTS, **asked), strict=True):
        assert (a.all_tokens, a.forwards) == (b.all_tokens, b.forwards)


@pytest.mark.parametrize(
    ("family", "cache", "policy"),
    [("llada_moe", "none", "hierarchical"), ("sdar", "block", "threshold")],
)
def test_smoothing(compiled: Compiled, family: str, cache: str, policy: str) -> None:
    runner, (model, table), facts = compiled(family, policy=policy, cache=cache, smoothing=0.3)
    knobs = dict(POLICIES)[policy]
    results = runner.generate(PROMPTS, gen_length=LENGTH, **knobs)
    whole = {**runner.limits.parameters, **knobs}
    wanted = [reference.smoothed(model, table, p, LENGTH, facts, policy, whole) for p in PROMPTS]
    same(results, wanted)
    # A request begins without the mixtures of the one before it.
    again = runner.generate(PROMPTS[::-1], gen_length=LENGTH, **knobs)
    same(again, wanted[::-1])
    plain = [
        reference.blockwise(lambda ids: model(ids, {}), p, LENGTH, facts, policy, whole)
        for p in PROMPTS
    ]
    assert [made.tokens for made in plain] != [made.tokens for made in wanted]
