"""LLaDA2: block-causal, half of each head rotated, grouped sigmoid routing, a shared expert."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dcompile.frontends.base import Config, Defaults, Definition, block_length
from dcompile.frontends.layers import (
    AttentionSizes,
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
from dcompile.frontends.layout import (
    Layout,
    attention_sizes,
    full_attention_only,
    no_window,
    own_head,
)
from dcompile.frontends.rotary import rope_theta, rotary_dim

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
    attention = attention_sizes(config, own_head(config), qk_norm=config.flag("use_qk_norm", True))
    kinds = layer_kinds(config)
    full_attention_only(config, len(kinds))
    length = block_length(config, BLOCK_LENGTH)
    decoder = decoder_sizes(config, attention.head_dim, length)
    moe = moe_sizes(config)
    dense = config.size("intermediate_size") if "dense" in kinds else 0
    layout = Layout(
        decoder=decoder,
        kinds=kinds,
        attention=partial(FusedAttention, attention),
        ffn={
            "moe": partial(MoE, moe, router=GroupedRouter),
            "dense": partial(GatedFFN, attention.hidden, dense),
        },
    )
    return Definition(
        family="llada2",
        vocab_size=decoder.vocab,
        max_positions=config.size("max_position_embeddings", 0) or None,
        layer_kinds=kinds,
        # Its report decodes with `dynamic` by the same threshold.
        defaults=Defaults(length, "block", threshold=0.95, tuned_for=("threshold", "dynamic")),
        build=layout.build,
        rename=rename,
        num_experts=moe.experts,
        block_length=length,
        tied=config.flag("tie_word_embeddings", False),
    )


def refuse_what_is_not_computed(config: Config) -> None:
    config.only("hidden_act", "silu")
    config.only("score_function", "sigmoid")
    config.only("moe_router_enable_expert_bias", True)
    config.only("use_bias", False)
    config.only("use_qkv_bias", False)
    config.only("use_rmsnorm", True)
    no_window(config)
    config.only("using_split_qkv_in_self_attention", False)
    config.only("num_nextn_predict_layers", 0)
    always_divided = "the authors' code always divides the experts' weights by their sum"
    config.only("norm_topk_prob", True, why=always_divided)
    config.only("norm_head", False, why="the authors' code never normalises the head")
    config.only("norm_softmax", False, why="the authors' code never normalises the logits")
    config.ignore("embedding_dropout intermediate_size output_dropout output_router_logits")
    config.only("router_dtype", "fp32", "float32", why="the authors' code routes in float32")


def decoder_sizes(config: Config, head_dim: int, length: int) -> DecoderSizes:
    return DecoderSizes(
        vocab=config.size("vocab_size"),
        hidden=config.size("hidden_size"),
        eps=config.number("rms_norm_eps"),
        rotary_dim=rotary_dim(config, head_dim),
        theta=rope_theta(config),
        block_length=length,
    )


def moe_sizes(config: Config) -> MoESizes:
    """A group needs two experts, as its score is the sum of its best two."""
    experts = config.size("num_experts", most=4096)
    groups = config.integer("n_group", 1, experts)
    kept = config.integer("topk_group", 1, groups)
    if config.divides("num_experts", "n_group") < 2 and groups > 1:
        raise config.error("n_group", f"groups of two experts or more, of {experts}")
    top_k = config.integer("num_experts_per_tok", 1, experts // groups * kept)
    if top_k == 1:
        undivided = "the authors' code does not divide the weight of a lone expert"
        raise config.error("num_experts_per_tok", f"two or more: {undivided}")
    inner = config.size("moe_intermediate_size")
    return MoESizes(
        hidden=config.size("hidden_size"),
        inner=inner,
        experts=experts,
        top_k=top_k,
        renormalize=True,
        scale=config.number("routed_scaling_factor"),
        groups=groups,
        kept_groups=kept,
        shared_inner=inner * shared_experts(config),
    )


def shared_experts(config: Config) -> int:
    """`num_shared_experts` may be null, which stands for none; it may not be absent."""
    if config.null("num_shared_experts"):
        return 0
    return config.integer("num_shared_experts", 0, 64)


def layer_kinds(config: Config) -> tuple[str, ...]:
    count = config.size("num_hidden_layers", most=1000)
    dense = config.integer("first_k_dense_replace", 0, count)
    return ("dense",) * dense + ("moe",) * (count - dense)


def rename(parameter: str) -> str:
    if parameter.startswith("lm_head."):
        return parameter
    name = parameter.replace("embed_tokens", "word_embeddings")
    return "model." + name.replace(".self_attn.", ".attention.")
