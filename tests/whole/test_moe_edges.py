"""Mixtures of experts at their edges, through whole artifacts, on every instruction set that runs here."""

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
from dcompile.codegen.cpu import build
from dcompile.runtime import artifact
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.processor import cpu_flags

MASK = 60
# sse4a says where avx512bf16 is worth taking, not where it runs.
ISAS = build.runnable([*cpu_flags(), "sse4a"])
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


def compiled(model: Model, folder: Path, length: int = 40, block: int = 8) -> list[Runner]:
    """A runner for each instruction set."""
    sizes = {"max_length": length, "block_length": block}
    runner = dcompile.compile(model, out=folder / "m.dcx", **sizes, **OPTIONS)
    kernels = [launch.kernel for launch in runner.artifact.plan.launches]
    dtype = {torch.float32: "f32", torch.bfloat16: "bf16"}[model.head.weight.dtype]
    assert kernels.count("route") == kernels.count(f"moe_ffn_{dtype}") == 1
    runners = []
    for isa in ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(artifact, "cpu_flags", lambda: frozenset(build.ISA_FLAGS[isa]))  # noqa: B023
            runners.append(Runner.load(folder / "m.dcx"))
        assert runners[-1].artifact.isa == isa
    return runners


def same(
    model: Model, runners: list[Runner], prompt: list[int], count: int = 16, block: int = 8
) -> None:
    wanted = decode(model, prompt, count, block, MASK, threshold=0.3)
    for runner in runners:
        (result,) = runner.generate([prompt], gen_length=count, threshold=0.3, early_stop=False)
        assert (result.all_tokens, result.forwards) == wanted, runner.artifact.isa


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


def in_float32(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    weights, index = spellings.softmax_renormalised(m, z)
    return weights.to(z.dtype), index


@pytest.mark.parametrize("top_k", [1, 5])
def test_bfloat16_with_one_expert_a_token_and_with_all(top_k: int, tmp_path: Path) -> None:
    """As AMX and pairs of bf16 multiply it: a prime count of experts, one and all of them chosen."""
    sizes = Sizes(hidden=40, inner=24, experts=5, top_k=top_k)
    model = Model(in_float32, sizes).to(torch.bfloat16)
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
    clean = compiled(model, tmp_path)[0]
    (wanted,) = clean.generate([[5, 6, 7]], gen_length=16, threshold=0.3, early_stop=False)
    with torch.no_grad():
        model.embed.weight[9] = poison
    assert 9 not in wanted.all_tokens
    for poisoned in compiled(model, tmp_path):
        (got,) = poisoned.generate([[5, 9, 7]], gen_length=16, threshold=0.3, early_stop=False)
        assert got.all_tokens == wanted.all_tokens, poisoned.artifact.isa
    with torch.no_grad():
        model.embed.weight[MASK] = poison
    for runner in compiled(model, tmp_path):
        (spoilt,) = runner.generate([[5, 6, 7]], gen_length=16, early_stop=False)
        assert len(spoilt.all_tokens) == 16 and MASK not in spoilt.all_tokens
