"""The shipped model: token-identical to the plain model without reuse, as accurate with it."""

from __future__ import annotations

import pytest
import torch

from dcompile.demo import GEN_LENGTH, MODEL, Example, heldout
from dcompile.driver.compile import compile_checkpoint
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result
from dcompile.step.plain_decode import PlainResult, plain_decode

BLOCK, THRESHOLD, COUNT = 8, 0.9, 64


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return heldout()[:: 256 // COUNT]


@pytest.fixture(scope="module")
def runner_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runner]:
    out: dict[str, Runner] = {}
    for cache in ("none", "dual", "prefix"):
        options = Options(max_length=128, batch=8, block_length=BLOCK, cache=cache)
        path = tmp_path_factory.mktemp(cache) / "model.dcx"
        out[cache] = Runner.load(compile_checkpoint(MODEL, options, path))
    return out


@pytest.fixture(scope="module")
def plain(examples: list[Example], runner_of: dict[str, Runner]) -> list[PlainResult]:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(MODEL)
    model, spec = checkpoint.reference(), checkpoint.spec
    ids = [runner_of["none"].tokenizer.encode(e.prompt, False) for e in examples]
    return [plain_decode(model, spec, i, GEN_LENGTH, BLOCK, threshold=THRESHOLD) for i in ids]


def generate(runner: Runner, examples: list[Example], batch: int) -> list[Result]:
    out: list[Result] = []
    for i in range(0, len(examples), batch):
        prompts = [e.prompt for e in examples[i : i + batch]]
        out += runner.generate(prompts, gen_length=GEN_LENGTH, threshold=THRESHOLD)
    return out


def right(results: list[Result], examples: list[Example]) -> float:
    pairs = zip(results, examples, strict=True)
    return sum((r.text or "").strip() == e.answer for r, e in pairs) / len(examples)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_none_is_token_identical(
    runner_of: dict[str, Runner], examples: list[Example], plain: list[PlainResult], batch: int
) -> None:
    results = generate(runner_of["none"], examples, batch)
    for result, wanted in zip(results, plain, strict=True):
        assert (list(result.all_tokens), result.forwards) == (wanted.tokens, wanted.forwards)


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_reuse_is_as_accurate(
    runner_of: dict[str, Runner], examples: list[Example], cache: str
) -> None:
    reference = right(generate(runner_of["none"], examples, 8), examples)
    assert reference > 0.95
    assert right(generate(runner_of[cache], examples, 8), examples) >= reference - 0.02
