"""Models that nobody here wrote: BERT with learned positions, a Llama without its causal mask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from slow import decode
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import dcompile
from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import DcompileError, MixesPositions, UnsupportedModel
from dcompile.options import Options

MASK = 99
PROMPTS = [[1, 2, 3, 4, 5], [7] * 11, [3, 1, 4, 1, 5, 9, 2, 6]]


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.25)
    return model.eval()


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=101,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=80,
    )
    return spread(BertForMaskedLM(config))


class Bidirectional(nn.Module):
    """A Llama whose mask lets every position see every other."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=101,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=128,
        )
        self.llama = spread(LlamaForCausalLM(config))

    def forward(self, ids: Tensor) -> Tensor:
        everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        logits: Tensor = self.llama(ids, attention_mask=everything, use_cache=False).logits
        return logits


@pytest.mark.parametrize("make", [bert, Bidirectional])
def test_a_foreign_model_gives_the_same_tokens(make: object, tmp_path: Path) -> None:
    assert callable(make)
    model = make()
    runner = dcompile.compile(
        model,
        mask_id=MASK,
        max_length=64,
        block_length=8,
        batch=2,
        cache="none",
        out=tmp_path / "model.dcx",
    )
    results = runner.generate(PROMPTS, gen_length=16, threshold=0.2, early_stop=False)
    seen = set()
    for prompt, result in zip(PROMPTS, results, strict=True):
        wanted = decode(model, prompt, 16, 8, MASK, threshold=0.2)
        assert (result.all_tokens, result.forwards) == wanted
        seen.update(result.all_tokens)
    assert len(seen) > 2


def test_an_exported_program_compiles(tmp_path: Path) -> None:
    model = Bidirectional()
    length = torch.export.Dim.AUTO(max=64)
    exported = torch.export.export(
        model, (torch.ones(1, 9, dtype=torch.int64),), dynamic_shapes=({1: length},), strict=False
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    options = Options(mask_id=MASK, max_length=64, block_length=8, cache="none")
    out = compile_checkpoint(tmp_path / "model.pt2", options, tmp_path / "model.dcx")
    (result,) = dcompile.load(out).generate([PROMPTS[0]], gen_length=16, threshold=0.2)
    assert (result.all_tokens, result.forwards) == decode(
        model, PROMPTS[0], 16, 8, MASK, threshold=0.2
    )


class Tiny(nn.Module):
    """Embedding, something, head: the something is what each test is about."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, 8)
        self.head = nn.Linear(8, 101)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(ids)))


class Shifts(Tiny):
    def middle(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 1)


class Averages(Tiny):
    def middle(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Accumulates(Tiny):
    def middle(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Transposes(Tiny):
    def middle(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(1, x.shape[1], 8)


class Convolves(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("model", [Shifts, Averages, Accumulates, Transposes, Convolves])
def test_a_model_that_mixes_positions_is_refused(model: type[Tiny], tmp_path: Path) -> None:
    with pytest.raises(MixesPositions) as refused:
        dcompile.compile(
            model(), mask_id=MASK, max_length=64, block_length=8, out=tmp_path / "m.dcx"
        )
    assert "where" in str(refused.value)
    assert not (tmp_path / "m.dcx").exists()


class Interleaves(Tiny):
    """Gate and up in turn in one product, as GPT-OSS has them."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def middle(self, x: Tensor) -> Tensor:
        both = self.both(x)
        gated: Tensor = nn.functional.silu(both[..., ::2]) * both[..., 1::2]
        return x + self.down(gated)


def test_a_gate_of_every_second_column_compiles(tmp_path: Path) -> None:
    model = spread(Interleaves())
    runner = dcompile.compile(
        model, mask_id=MASK, max_length=64, block_length=8, out=tmp_path / "m.dcx"
    )
    assert "silu_mul_f32" in [launch.kernel for launch in runner.artifact.plan.launches]
    (result,) = runner.generate([[1, 2, 3]], gen_length=16, threshold=0.2)
    assert (result.all_tokens, result.forwards) == decode(
        model, [1, 2, 3], 16, 8, MASK, threshold=0.2
    )


def test_a_model_without_attention_compiles(tmp_path: Path) -> None:
    model = Tiny().eval()
    runner = dcompile.compile(
        model, mask_id=MASK, max_length=64, block_length=8, out=tmp_path / "m.dcx"
    )
    (result,) = runner.generate([[1, 2, 3]], gen_length=8, threshold=0.2)
    assert (result.all_tokens, result.forwards) == decode(
        model, [1, 2, 3], 8, 8, MASK, threshold=0.2
    )


class Selects(Tiny):
    def middle(self, x: Tensor) -> Tensor:
        return x[:, x[0, :, 0] > 0]


class Branches(Tiny):
    def middle(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Causal(Tiny):
    """A mask that is neither full nor block-causal: a sliding window."""

    def middle(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        near = (at[:, None] - at[None, :]).abs() < 3
        heads = x[:, None]
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=near)[:, 0]


class Returns(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        return {"scores": super().forward(ids)}  # type: ignore[return-value]


@pytest.mark.parametrize("model", [Selects, Branches, Causal, Returns])
def test_other_models_are_refused_by_name(model: type[Tiny], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        dcompile.compile(
            model(), mask_id=MASK, max_length=64, block_length=8, out=tmp_path / "m.dcx"
        )
    assert isinstance(refused.value, DcompileError)
    assert refused.value.remedy


def test_another_dtype_leaves_the_module_as_it_is() -> None:
    """With a policy that asks for tokens' probabilities, which any module may have."""
    model = bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner = dcompile.compile(
        model, mask_id=MASK, dtype="bfloat16", max_length=64, block_length=8, policy="remask"
    )
    (result,) = runner.generate([[1, 2, 3]], gen_length=16)
    assert len(result.all_tokens) == 16 and MASK not in result.all_tokens
    after = model.state_dict()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
