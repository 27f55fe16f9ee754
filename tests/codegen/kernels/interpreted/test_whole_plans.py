"""Whole generations of tiny models: plans for CUDA, interpreted, give the tokens of the CPU's artifacts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import interpreter  # first of all
import pytest
import torch
from checkpoints import write_checkpoint
from interpreted_plan import open_interpreted

from dcompile.driver.compile import compile_checkpoint, compile_module
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner

assert interpreter
PROMPTS = [[1, 2, 3, 4, 5], [3, 1, 4]]


def compare(tmp_path: Path, family: str, **options: object) -> int:
    """Both artifacts' tokens and forwards, in float32; how many tokens differ from their neighbours."""
    torch.set_num_threads(1)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", family)
    own = family in ("llada2", "sdar", "sdar_moe")
    base = {"max_length": 96 if family == "llada2" else 24, "batch": 2}
    given = Options(**{**base, **({} if own else {"block_length": 4}), **options})  # type: ignore[arg-type]
    cpu = compile_checkpoint(checkpoint, given, tmp_path / "cpu.dcx")
    cuda = compile_checkpoint(checkpoint, given.changed(target="cuda:sm_90"), tmp_path / "cuda.dcx")
    asked: dict[str, object] = {"gen_length": 8, "early_stop": False}
    if given.policy is None:
        asked["threshold"] = 0.1
    runner = open_interpreted(cuda)
    wanted = Runner.load(cpu).generate(PROMPTS, **asked)  # type: ignore[arg-type]
    found = runner.generate(PROMPTS, **asked)  # type: ignore[arg-type]
    for one, other in zip(wanted, found, strict=True):
        assert (one.all_tokens, one.forwards) == (other.all_tokens, other.forwards)
    return len({token for result in found for token in result.all_tokens})


def test_llada_moe_gives_the_same_tokens(tmp_path: Path) -> None:
    assert compare(tmp_path, "llada_moe", cache="dual") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada2", "llada", "dream", "sdar", "sdar_moe"])
def test_every_other_family_gives_the_same_tokens(tmp_path: Path, family: str) -> None:
    assert compare(tmp_path, family) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        *("steps", "credit", "factor", "dynamic", "entropy", "hierarchical", "likelihood"),
        *("edit", "remask", "margin", "maskgit_plus"),
    ],
)
def test_every_policy_gives_the_same_tokens(tmp_path: Path, policy: str) -> None:
    assert compare(tmp_path, "llada_moe", policy=policy) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "Bidirectional"])
def test_foreign_models_give_the_same_tokens(tmp_path: Path, name: str) -> None:
    """Their norms, rotations and embeddings are printed from the graph; no launch is torch's."""
    path = Path(__file__).parents[3] / "whole" / "test_modules.py"
    spec = importlib.util.spec_from_file_location("foreign_models", path)
    assert spec is not None and spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    model = getattr(models, name)()
    given = Options(mask_id=99, max_length=24, block_length=4, batch=2, cache="none")
    cpu = compile_module(model, given, tmp_path / "cpu.dcx")
    cuda = compile_module(model, given.changed(target="cuda:sm_90"), tmp_path / "cuda.dcx")
    asked = {"gen_length": 8, "early_stop": False, "threshold": 0.2}
    wanted = Runner.load(cpu).generate(PROMPTS, **asked)  # type: ignore[arg-type]
    found = open_interpreted(cuda).generate(PROMPTS, **asked)  # type: ignore[arg-type]
    for one, other in zip(wanted, found, strict=True):
        assert (one.all_tokens, one.forwards) == (other.all_tokens, other.forwards)
