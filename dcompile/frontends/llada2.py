"""LLaDA2: block-causal, half of each head rotated, grouped sigmoid routing, a shared expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcompile.frontends.base import Config, Definition, block_length, rope_theta, rotary_dim
from dcompile.frontends.layers import (
    AttentionSizes,
    Decoder,
    DecoderLayer,
    DecoderSizes,
    GatedFFN,
    GroupedRouter,
    Linear,
    MoE,
    MoESizes,
    attend,
    rotate,
    split_heads,
)

BLOCK_LENGTH = 32


class FusedAttention(nn.Module):
    """Attention whose q, k and v come from one projection, in this order."""

    def __init__(self, sizes: AttentionSizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = sizes
        inner, width = sizes.heads * sizes.head_dim, sizes.head_dim
        self.query_key_value = Linear(
            sizes.hidden, inner + 2 * sizes.kv_heads * width, bias=False, dtype=dtype
        )
        if sizes.qk_norm:
            self.query_layernorm = nn.RMSNorm(width, sizes.eps, dtype=dtype)
            self.key_layernorm = nn.RMSNorm(width, sizes.eps, dtype=dtype)
        self.dense = Linear(inner, sizes.hidden, bias=False, dtype=dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        heads, kv_heads = self.sizes.heads, self.sizes.kv_heads
        qkv = split_heads(self.query_key_value(x), self.sizes.head_dim)
        q, k, v = torch.split_with_sizes(qkv, (heads, kv_heads, kv_heads), dim=2)
        if self.sizes.qk_norm:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        out: Tensor = self.dense(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask))
        return out


def read(config: Config) -> Definition:
    """The model that a `LLaDA2MoeModelLM` config describes."""
    refuse_what_is_not_computed(config)
    attention = attention_sizes(config)
    kinds = layer_kinds(config)
    model = Llada2(
        decoder=decoder_sizes(config, attention.head_dim),
        attention=attention,
        moe=moe_sizes(config),
        dense_inner=config.size("intermediate_size") if "dense" in kinds else 0,
        layer_kinds=kinds,
    )
    length = block_length(config, BLOCK_LENGTH)
    return Definition(
        family="llada2",
        vocab_size=model.decoder.vocab,
        max_positions=config.size("max_position_embeddings", 0) or None,
        layer_kinds=kinds,
        defaults={
            "block_length": length,
            "policy": "threshold",
            "cache": "block",
            "threshold": 0.95,
        },
        build=model.build,
        rename=rename,
        num_experts=model.moe.experts,
        block_length=length,
        tied=config.flag("tie_word_embeddings", False),
    )


@dataclass(frozen=True)
class Llada2:
    decoder: DecoderSizes
    attention: AttentionSizes
    moe: MoESizes
    dense_inner: int
    layer_kinds: tuple[str, ...]

    def build(self, layers: Sequence[int], dtype: torch.dtype) -> Decoder:
        return Decoder(self.decoder, dtype, (self.layer(i, dtype) for i in layers))

    def layer(self, i: int, dtype: torch.dtype) -> DecoderLayer:
        hidden, eps = self.decoder.hidden, self.decoder.eps
        if self.layer_kinds[i] == "moe":
            mlp: MoE | GatedFFN = MoE(self.moe, dtype, GroupedRouter(self.moe, dtype))
        else:
            mlp = GatedFFN(hidden, self.dense_inner, dtype)
        return DecoderLayer(hidden, eps, dtype, FusedAttention(self.attention, dtype), mlp)


def refuse_what_is_not_computed(config: Config) -> None:
    config.only("hidden_act", "silu")
    config.only("score_function", "sigmoid")
    config.only("moe_router_enable_expert_bias", True)
    config.only("use_bias", False)
    config.only("use_qkv_bias", False)
    config.only("use_rmsnorm", True)
    config.only("use_sliding_window", False)
    config.only("using_split_qkv_in_self_attention", False)


def attention_sizes(config: Config) -> AttentionSizes:
    if config.given("head_dim"):
        head_dim = config.size("head_dim")
    else:
        head_dim = config.divides("hidden_size", "num_attention_heads")
    config.divides("num_attention_heads", "num_key_value_heads")
    return AttentionSizes(
        hidden=config.size("hidden_size"),
        heads=config.size("num_attention_heads"),
        kv_heads=config.size("num_key_value_heads"),
        head_dim=head_dim,
        eps=config.number("rms_norm_eps"),
        qk_norm=config.flag("use_qk_norm", True),
    )


def decoder_sizes(config: Config, head_dim: int) -> DecoderSizes:
    turned = rotary_dim(config, head_dim, config.number("partial_rotary_factor"))
    config.only("rotary_dim", turned)
    return DecoderSizes(
        vocab=config.size("vocab_size"),
        hidden=config.size("hidden_size"),
        eps=config.number("rms_norm_eps"),
        rotary_dim=turned,
        theta=rope_theta(config),
        block_length=block_length(config, BLOCK_LENGTH),
    )


def moe_sizes(config: Config) -> MoESizes:
    """A group needs two experts, as its score is the sum of its best two."""
    experts = config.size("num_experts", most=4096)
    groups = config.integer("n_group", 1, experts)
    kept = config.integer("topk_group", 1, groups)
    if config.divides("num_experts", "n_group") < 2 and groups > 1:
        raise config.error("n_group", f"groups of two experts or more, of {experts}")
    inner = config.size("moe_intermediate_size")
    return MoESizes(
        hidden=config.size("hidden_size"),
        inner=inner,
        experts=experts,
        top_k=config.integer("num_experts_per_tok", 1, experts // groups * kept),
        renormalize=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor"),
        groups=groups,
        kept_groups=kept,
        shared_inner=inner * shared_experts(config),
    )


def shared_experts(config: Config) -> int:
    """`num_shared_experts` may be null, which stands for none; it may not be absent."""
    null = "num_shared_experts" in config.values and not config.given("num_shared_experts")
    return 0 if null else config.integer("num_shared_experts", 0, 64)


def layer_kinds(config: Config) -> tuple[str, ...]:
    count = config.size("num_hidden_layers", most=1000)
    dense = config.integer("first_k_dense_replace", 0, count)
    return ("dense",) * dense + ("moe",) * (count - dense)


def rename(parameter: str) -> str:
    if parameter.startswith("lm_head."):
        return parameter
    name = parameter.replace("embed_tokens", "word_embeddings")
    return "model." + name.replace(".self_attn.", ".attention.")
