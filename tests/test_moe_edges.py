"""Mixtures of experts at their edges, through whole artifacts: right, or an error by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import spellings
import torch
from slow import decode
from spellings import Mixture, Router, Sizes
from torch import Tensor, nn

import dcompile
from dcompile.runtime.loop import Runner

MASK = 60
OPTIONS = {"mask_id": MASK, "cache": "none"}


class Model(nn.Module):
    """Embedding, norm, a mixture, head: no position sees another."""

    def __init__(self, router: Router, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(61, sizes.hidden)
        self.norm = nn.LayerNorm(sizes.hidden)
        self.block = Mixture(sizes, router, spellings.einsum_all)
        self.head = nn.Linear(sizes.hidden, 61, bias=False)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.block(self.norm(x)))


def compiled(model: Model, folder: Path, length: int = 40, block: int = 8) -> Runner:
    sizes = {"max_length": length, "block_length": block}
    runner = dcompile.compile(model, out=folder / "m.dcx", **sizes, **OPTIONS)
    kernels = [launch.kernel for launch in runner.artifact.plan.launches]
    assert kernels.count("route") == kernels.count("moe_ffn_f32") == 1
    return runner


def same(model: Model, runner: Runner, prompt: list[int], count: int = 16, block: int = 8) -> None:
    (result,) = runner.generate([prompt], gen_length=count, threshold=0.3, early_stop=False)
    wanted = decode(model, prompt, count, block, MASK, threshold=0.3)
    assert (result.all_tokens, result.forwards) == wanted


@pytest.mark.parametrize("least", [-9.0, 9.0], ids=["nobody chose one", "everybody chose one"])
def test_an_expert_for_nobody_and_for_everybody(least: float, tmp_path: Path) -> None:
    model = Model(spellings.sigmoid_biased, Sizes(experts=5, top_k=1))
    with torch.no_grad():
        model.block.bias[2] = least
        x = model.norm(model.embed(torch.arange(61)[None]))
        chosen = model.block.router(model.block, model.block.gate(x))[1]
    assert set(chosen.flatten().tolist()) == ({2} if least > 0 else {0, 1, 3, 4})
    same(model, compiled(model, tmp_path), [5, 6, 7])


def test_top_k_equal_to_the_number_of_experts(tmp_path: Path) -> None:
    model = Model(spellings.softmax, Sizes(experts=4, top_k=4))
    same(model, compiled(model, tmp_path), [5, 6, 7])


def test_one_token_and_4096(tmp_path: Path) -> None:
    model = Model(spellings.softmax_of_chosen, Sizes(experts=6, top_k=2))
    same(model, compiled(model, tmp_path, 40, 1), [], 1, 1)
    prompt = torch.randint(0, 60, (4088,), generator=torch.Generator().manual_seed(1)).tolist()
    same(model, compiled(model, tmp_path, 4096), prompt, 8)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("router", [spellings.softmax_renormalised, spellings.sigmoid_biased])
def test_numbers_that_are_none_stay_in_their_row(
    poison: float, router: Router, tmp_path: Path
) -> None:
    """A token whose router logits are NaN or infinite spoils no other row, and decoding ends."""
    model = Model(router, Sizes(experts=6, top_k=2))
    clean = compiled(model, tmp_path)
    (wanted,) = clean.generate([[5, 6, 7]], gen_length=16, threshold=0.3, early_stop=False)
    with torch.no_grad():
        model.embed.weight[9] = poison
    assert 9 not in wanted.all_tokens
    poisoned = compiled(model, tmp_path)
    (got,) = poisoned.generate([[5, 9, 7]], gen_length=16, threshold=0.3, early_stop=False)
    assert got.all_tokens == wanted.all_tokens
    with torch.no_grad():
        model.embed.weight[MASK] = poison
    (spoilt,) = compiled(model, tmp_path).generate([[5, 6, 7]], gen_length=16, early_stop=False)
    assert len(spoilt.all_tokens) == 16 and MASK not in spoilt.all_tokens
