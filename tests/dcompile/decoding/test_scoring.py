"""Likelihoods from the compiled step beside those of the plain model's logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from dcompile.decoding.scoring import Scorer, _seed, spread_masks
from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import RequestError
from dcompile.frontends.checkpoint import Checkpoint, open_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner


@pytest.fixture(scope="module", params=["llada_moe", "dream", "sdar"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Runner]:
    root = tmp_path_factory.mktemp(request.param)
    folder = write_checkpoint(root / "checkpoint", request.param)
    checkpoint = open_checkpoint(folder)
    block = checkpoint.spec.block_length or 4
    options = Options(max_length=48, batch=3, block_length=block, cache="none", policy="likelihood")
    return checkpoint, Runner.load(compile_checkpoint(folder, options, root / "model.dcx"))


def plain_logits(checkpoint: Checkpoint, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = checkpoint.reference()(torch.tensor([ids]))[0].double()
    return torch.cat((logits[:1], logits[:-1])) if checkpoint.spec.shift else logits


@pytest.mark.parametrize(("before", "length"), [(0, 3), (5, 1), (3, 7), (8, 4)])
def test_a_likelihood_is_that_of_the_plain_logits(
    made: tuple[Checkpoint, Runner], before: int, length: int
) -> None:
    checkpoint, runner = made
    spec = checkpoint.spec
    rng = np.random.default_rng(before * 10 + length)
    text = rng.integers(1, 90, before + length).tolist()
    total = runner.limits.total(before, length)
    padded = [*text, *[spec.mask_id] * (total - len(text))]
    samples = 1 if length == 1 else 5
    sums = []
    for mask in spread_masks(length, samples, _seed(np.array(padded))):
        masked = list(padded)
        for i in np.flatnonzero(mask):
            masked[before + i] = spec.mask_id
        logp = plain_logits(checkpoint, masked).log_softmax(-1)
        each = [float(logp[before + i, text[before + i]]) for i in np.flatnonzero(mask)]
        sums.append(sum(each) * length / mask.sum())
    found = Scorer(runner).log_likelihood(text[:before], text[before:], samples)
    assert found == pytest.approx(sum(sums) / samples, rel=1e-4)


@pytest.mark.parametrize("length", [1, 6])
def test_what_the_model_writes_is_greedy(made: tuple[Checkpoint, Runner], length: int) -> None:
    checkpoint, runner = made
    context, mask_id = [5, 9, 2], checkpoint.spec.mask_id
    total = runner.limits.total(3, length)
    ids = [*context, *[mask_id] * (total - 3)]
    n = runner.limits.block_length
    for begin in range(0, length, n):
        while True:
            at = [p for p in range(3 + begin, min(3 + begin + n, 3 + length)) if ids[p] == mask_id]
            if not at:
                break
            p = plain_logits(checkpoint, ids).softmax(-1)
            p[:, mask_id] = 0
            best = max(at, key=lambda i: float(p[i].max()))
            ids[best] = int(p[best].argmax())
    written = ids[3 : 3 + length]
    scorer = Scorer(runner)
    assert scorer.is_greedy(context, written)
    for i in range(length):
        other = list(written)
        other[i] = (other[i] + 1) % 90
        assert not scorer.is_greedy(context, other)


def test_a_score_depends_on_nothing_before_it(made: tuple[Checkpoint, Runner]) -> None:
    scorer = Scorer(made[1])
    pairs = [([1, 2, 3], [4, 5]), ([], [7, 8, 9, 10, 11]), ([3], [1])]
    once = [scorer.log_likelihood(*pair, samples=4) for pair in pairs]
    made[1].generate([[1, 2, 3]], gen_length=made[1].limits.block_length)
    assert [scorer.log_likelihood(*pair, samples=4) for pair in reversed(pairs)] == once[::-1]
    assert scorer.log_likelihood([1, 2], []) == 0.0


def test_refuses(made: tuple[Checkpoint, Runner]) -> None:
    scorer = Scorer(made[1])
    with pytest.raises(RequestError, match="--max-length"):
        scorer.log_likelihood([1] * 40, [2] * 20)
    with pytest.raises(RequestError, match="cannot be scored"):
        scorer.log_likelihood([1], [made[0].spec.mask_id])


@settings(deadline=None, max_examples=50)
@given(length=st.integers(1, 40), samples=st.integers(1, 64), seed=st.integers(0, 1 << 32))
def test_masks_are_spread_evenly(length: int, samples: int, seed: int) -> None:
    masks = spread_masks(length, samples, seed)
    counts = masks.sum(1)
    assert masks.shape == (samples, length) and counts.min() >= 1
    seen = np.bincount(counts, minlength=length + 1)[1:]
    assert seen.max() - seen.min() <= 1
    assert (masks == spread_masks(length, samples, seed)).all()
