"""LLaDA-MoE: bidirectional attention with q/k norms, softmax-routed experts."""

from __future__ import annotations

from functools import partial

from dcompile.frontends.base import Config, Defaults, Definition
from dcompile.frontends.layers import (
    Attention,
    DecoderSizes,
    GatedFFN,
    MoE,
    MoESizes,
    SoftmaxRouter,
)
from dcompile.frontends.layout import (
    Layout,
    attention_sizes,
    divided_head,
    full_attention_only,
    in_model,
    no_window,
)
from dcompile.frontends.rotary import rope_theta, rotary_dim

DEFAULTS = Defaults(block_length=64, cache="dual", threshold=0.8)


def read(config: Config) -> Definition:
    """The model that a `LLaDAMoEModelLM` config describes."""
    refuse_what_is_not_computed(config)
    kinds = layer_kinds(config)
    full_attention_only(config, len(kinds))
    head_dim = divided_head(config)
    attention = attention_sizes(config, head_dim, qk_norm=config.required_flag("qk_layernorm"))
    decoder = decoder_sizes(config, head_dim)
    moe = moe_sizes(config)
    dense = config.size("dense_intermediate_size") if "dense" in kinds else 0
    layout = Layout(
        decoder=decoder,
        kinds=kinds,
        attention=partial(Attention, attention),
        ffn={
            "moe": partial(MoE, moe, router=SoftmaxRouter),
            "dense": partial(GatedFFN, attention.hidden, dense),
        },
    )
    return Definition(
        family="llada_moe",
        vocab_size=decoder.vocab,
        max_positions=config.size("max_position_embeddings", 0) or None,
        layer_kinds=kinds,
        defaults=DEFAULTS,
        build=layout.build,
        rename=in_model,
        num_experts=moe.experts,
        tied=config.flag("tie_word_embeddings", False),
    )


def refuse_what_is_not_computed(config: Config) -> None:
    config.only("hidden_act", "silu")
    config.only("attention_bias", False)
    config.only("clip_qkv")
    no_window(config)
    config.only("moe_router_score_function", "softmax")
    config.only("moe_router_enable_expert_bias", False)
    config.only("shared_expert_intermediate_size", 0)
    never_scaled = "the authors' code never scales the experts' weights"
    config.only("routed_scaling_factor", 1, why=never_scaled)
    if config.required_flag("norm_topk_prob"):
        never_divided = "the authors' code never divides the experts' weights by their sum"
        raise config.error("norm_topk_prob", f"False: {never_divided}")
    config.only("router_num_group", 1)
    config.only("router_topk_group", 1)
    config.ignore("dense_intermediate_size output_router_logits router_aux_loss_coef")


def decoder_sizes(config: Config, head_dim: int) -> DecoderSizes:
    return DecoderSizes(
        vocab=config.size("vocab_size"),
        hidden=config.size("hidden_size"),
        eps=config.number("rms_norm_eps"),
        rotary_dim=rotary_dim(config, head_dim, 1.0),
        theta=rope_theta(config),
    )


def moe_sizes(config: Config) -> MoESizes:
    experts = config.size("num_experts", most=4096)
    return MoESizes(
        hidden=config.size("hidden_size"),
        inner=config.size("expert_intermediate_size"),
        experts=experts,
        top_k=config.integer("num_experts_per_tok", 1, experts),
        renormalize=False,
    )


def layer_kinds(config: Config) -> tuple[str, ...]:
    """`moe_layer_freq` is one number for all layers, or a list with one a layer; 1 is MoE."""
    count = config.size("num_hidden_layers", most=1000)
    frequency = config.get("moe_layer_freq") if "moe_layer_freq" in config.values else 1
    each = frequency if isinstance(frequency, list) else [frequency] * count
    if len(each) != count or any(one not in (0, 1) for one in each):
        raise config.error("moe_layer_freq", f"0 or 1, or a list of {count} of them (one a layer)")
    return tuple("moe" if one else "dense" for one in each)
