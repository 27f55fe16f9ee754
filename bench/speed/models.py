"""Random checkpoints of given sizes in the LLaDA-MoE layout, sharded like real ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Sizes:
    layers: int
    hidden: int
    heads: int
    experts: int
    top_k: int
    inner: int
    vocab: int


MID = Sizes(8, 1024, 16, 32, 4, 512, 32768)
WIDE = Sizes(4, 2048, 16, 64, 8, 1024, 32768)
FULL = Sizes(16, 2048, 16, 64, 8, 1024, 157184)


def config_of(s: Sizes, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads,
        "num_experts": s.experts,
        "num_experts_per_tok": s.top_k,
        "expert_intermediate_size": s.inner,
        "dense_intermediate_size": 4 * s.hidden,
        "shared_expert_intermediate_size": 0,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "qk_layernorm": True,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "routed_scaling_factor": 1.0,
        "rope_theta": 50000,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": s.vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "pad_token_id": s.vocab - 2,
        "eos_token_id": s.vocab - 2,
        "mask_token_id": s.vocab - 1,
        "torch_dtype": dtype,
        "hidden_act": "silu",
    }


def write(folder: Path, sizes: Sizes, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """One shard a layer, so that no more than a layer is ever in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config_of(sizes, name), indent=1))
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    d, f, size = sizes.hidden, sizes.inner, sizes.hidden // sizes.heads
    ones = torch.ones(d, dtype=dtype)
    ends = {
        "model.embed_tokens.weight": draw(sizes.vocab, d) * d**0.5,
        "model.norm.weight": ones,
        "lm_head.weight": draw(sizes.vocab, d),
    }
    index: dict[str, str] = {}
    count = sizes.layers + 1
    total = _save(folder, 1, count, ends, index)
    for i in range(sizes.layers):
        at = f"model.layers.{i}"
        shard = {
            f"{at}.input_layernorm.weight": ones.clone(),
            f"{at}.post_attention_layernorm.weight": ones.clone(),
            f"{at}.self_attn.q_norm.weight": torch.ones(size, dtype=dtype),
            f"{at}.self_attn.k_norm.weight": torch.ones(size, dtype=dtype),
            f"{at}.mlp.gate.weight": draw(sizes.experts, d),
        }
        shard |= {f"{at}.self_attn.{p}_proj.weight": draw(d, d) for p in "qkvo"}
        for e in range(sizes.experts):
            shard[f"{at}.mlp.experts.{e}.gate_proj.weight"] = draw(f, d)
            shard[f"{at}.mlp.experts.{e}.up_proj.weight"] = draw(f, d)
            shard[f"{at}.mlp.experts.{e}.down_proj.weight"] = draw(d, f)
        total += _save(folder, i + 2, count, shard, index)
    text = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(text, indent=1))
    return folder


def _save(
    folder: Path, number: int, count: int, shard: dict[str, torch.Tensor], index: dict[str, str]
) -> int:
    name = f"model-{number:05}-of-{count:05}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    index.update(dict.fromkeys(shard, name))
    return sum(t.numel() * t.element_size() for t in shard.values())
