"""SDAR: Qwen3's decoder, dense or MoE, with attention that is causal between blocks only."""

from __future__ import annotations

from functools import partial

from dcompile.frontends.base import Config, Defaults, Definition, block_length
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
    Part,
    attention_sizes,
    full_attention_only,
    in_model,
    no_window,
    own_head,
)
from dcompile.frontends.rotary import rope_theta, whole_heads

BLOCK_LENGTH = 4


def read(config: Config) -> Definition:
    """The model that a `SDARForCausalLM` config describes."""
    return define(config, "sdar", None)


def read_moe(config: Config) -> Definition:
    """The model that a `SDARMoeForCausalLM` config describes."""
    return define(config, "sdar_moe", moe_sizes(config))


def define(config: Config, family: str, moe: MoESizes | None) -> Definition:
    refuse_what_is_not_computed(config)
    attention = attention_sizes(config, own_head(config), qk_norm=True)
    length = block_length(config, BLOCK_LENGTH)
    kinds = layer_kinds(config, moe)
    full_attention_only(config, len(kinds))
    dense = config.size("intermediate_size") if "dense" in kinds else 0
    ffn: dict[str, Part] = {"dense": partial(GatedFFN, attention.hidden, dense)}
    if moe is not None:
        ffn["moe"] = partial(MoE, moe, router=SoftmaxRouter)
    layout = Layout(
        decoder=DecoderSizes(
            vocab=config.size("vocab_size"),
            hidden=attention.hidden,
            eps=attention.eps,
            rotary_dim=whole_heads(config, attention.head_dim),
            theta=rope_theta(config),
            block_length=length,
        ),
        kinds=kinds,
        attention=partial(Attention, attention),
        ffn=ffn,
    )
    return Definition(
        family=family,
        vocab_size=layout.decoder.vocab,
        max_positions=config.size("max_position_embeddings", 0) or None,
        layer_kinds=kinds,
        # Its report decodes with `dynamic` by the same threshold.
        defaults=Defaults(length, "block", threshold=0.85, tuned_for=("threshold", "dynamic")),
        build=layout.build,
        rename=in_model,
        num_experts=moe.experts if moe else 0,
        block_length=length,
        tied=config.flag("tie_word_embeddings", False),
    )


def refuse_what_is_not_computed(config: Config) -> None:
    config.only("hidden_act", "silu")
    config.only("attention_bias", False)
    no_window(config)
    config.ignore("debug ep_size fuse_cross_entropy micro_forward skip_checkpoint use_deepep")


def moe_sizes(config: Config) -> MoESizes:
    config.ignore("intermediate_size output_router_logits router_aux_loss_coef")
    experts = config.size("num_experts", most=4096)
    return MoESizes(
        hidden=config.size("hidden_size"),
        inner=config.size("moe_intermediate_size"),
        experts=experts,
        top_k=config.integer("num_experts_per_tok", 1, experts),
        renormalize=config.required_flag("norm_topk_prob"),
    )


def layer_kinds(config: Config, moe: MoESizes | None) -> tuple[str, ...]:
    """Every `decoder_sparse_step`-th layer is MoE, but for those of `mlp_only_layers`."""
    count = config.size("num_hidden_layers", most=1000)
    if moe is None:
        return ("dense",) * count
    step = config.size("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(i not in range(count) for i in dense):
        raise config.error("mlp_only_layers", f"a list of layers from 0 to {count - 1}")
    return tuple("moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in range(count))
