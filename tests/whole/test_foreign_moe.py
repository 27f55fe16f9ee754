"""Mixtures of experts of `transformers`, compiled as they are: fused, and the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from slow import decode
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import dcompile
from dcompile.driver.pipeline import run
from dcompile.ir import operators
from dcompile.ir.program import StepShape
from dcompile.ir.weights import Source
from dcompile.options import Options
from dcompile.policies import find_policy
from dcompile.step.trace import Traced, trace

MASK = 99
COMMON = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=5))


def qwen3_moe() -> nn.Module:
    sizes = {"num_experts": 6, "moe_intermediate_size": 20, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **sizes, norm_topk_prob=True))


def olmoe() -> nn.Module:
    return OlmoeForCausalLM(OlmoeConfig(**COMMON, num_experts=6))


def deepseek_v3() -> nn.Module:
    """A dense first layer, groups of experts, a selection bias, shared experts, a scale."""
    heads = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    experts = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
    config = {**COMMON, **heads, **experts, "num_key_value_heads": 4, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**config, moe_intermediate_size=12, first_k_dense_replace=1)
    )


class Bidirectional(nn.Module):
    """The model with a mask that lets every position see every other."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
                if tensor.dim() > 1 or name.endswith("e_score_correction_bias"):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.25)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        logits: Tensor = self.inner(ids, attention_mask=everything, use_cache=False).logits
        return logits


@pytest.mark.parametrize(
    "make, layers",
    [
        pytest.param(mixtral, 2, id="mixtral"),
        pytest.param(qwen3_moe, 2, id="qwen3_moe"),
        pytest.param(olmoe, 2, id="olmoe", marks=pytest.mark.slow),
    ],
)
def test_same_tokens(make: Callable[[], nn.Module], layers: int, tmp_path: Path) -> None:
    model = Bidirectional(make())
    options = {"mask_id": MASK, "max_length": 32, "block_length": 8, "cache": "none"}
    runner = dcompile.compile(model, out=tmp_path / "m.dcx", **options)
    kernels = [launch.kernel for launch in runner.artifact.plan.launches]
    assert (kernels.count("route"), kernels.count("moe_ffn_f32")) == (layers, layers)
    prompts = [[1, 2, 3, 4, 5], [3, 1, 4, 1, 5, 9, 2]]
    for prompt in prompts:
        (result,) = runner.generate([prompt], gen_length=8, threshold=0.2, early_stop=False)
        assert (result.all_tokens, result.forwards) == decode(
            model, prompt, 8, 8, MASK, threshold=0.2
        )


def test_groups_bias_and_shared_experts_of_deepseek_v3_are_read() -> None:
    """Its attention writes into empty tensors, which is refused; its experts are fused before."""
    model = Bidirectional(deepseek_v3())
    shape = StepShape(1, 32, 4, MASK, torch.float32)
    recipes = {name: Source(name) for name, _ in model.named_parameters()}
    program = trace(model, Traced(shape, find_policy("threshold"), recipes))
    run(program, Options(stop_after="fuse_moe"))
    (route,) = program.calls(operators.ROUTE)
    assert route.args[2:6] == (2, "sigmoid", 4, 2) and route.args[1] is not None
    assert route.args[6:] == (True, 2.5)
