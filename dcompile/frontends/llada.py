"""LLaDA-8B and 1.5: a dense bidirectional decoder, configured and named as in OLMo."""

from __future__ import annotations

from functools import partial

from dcompile.frontends.base import Config, Defaults, Definition
from dcompile.frontends.layers import (
    Attention,
    AttentionSizes,
    DecoderSizes,
    GatedFFN,
)
from dcompile.frontends.layout import Layout, full_attention_only
from dcompile.frontends.rotary import rope_theta, whole_heads

DEFAULTS = Defaults(block_length=32, cache="dual", threshold=0.9)
ENDS = {
    "embed_tokens.weight": "model.transformer.wte.weight",
    "norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def read(config: Config) -> Definition:
    """The model that a `LLaDAModelLM` config describes."""
    refuse_what_is_not_computed(config)
    attention = attention_sizes(config)
    kinds = ("dense",) * config.size("n_layers", most=1000)
    full_attention_only(config, len(kinds))
    inner = config.size("mlp_hidden_size")
    layout = Layout(
        decoder=DecoderSizes(
            vocab=table_rows(config),
            hidden=attention.hidden,
            eps=attention.eps,
            rotary_dim=whole_heads(config, attention.head_dim),
            theta=rope_theta(config),
            rotate_in_float32=config.flag("rope_full_precision", True),
        ),
        kinds=kinds,
        attention=partial(Attention, attention),
        ffn={"dense": partial(GatedFFN, attention.hidden, inner)},
    )
    return Definition(
        family="llada",
        vocab_size=layout.decoder.vocab,
        max_positions=config.size("max_sequence_length", 0) or None,
        layer_kinds=kinds,
        defaults=DEFAULTS,
        build=layout.build,
        rename=rename,
        tied=config.flag("weight_tying", True),
    )


def refuse_what_is_not_computed(config: Config) -> None:
    # Absent, these have other values in the authors' code.
    for key, computed in (
        ("activation_type", "silu"),
        ("block_type", "llama"),
        ("layer_norm_type", "rms"),
        ("rope", True),
    ):
        if not config.given(key):
            raise config.error(key, repr(computed))
        config.only(key, computed)
    config.only("layer_norm_with_affine", True)
    config.only("clip_qkv")
    for key in (
        "alibi",
        "attention_layer_norm",
        "bias_for_layer_norm",
        "include_bias",
        "include_qkv_bias",
        "input_emb_norm",
        "multi_query_attention",
        "scale_logits",
    ):
        config.only(key, False)
    config.only("block_group_size", 1)
    for name, own in (
        ("hidden_size", "d_model"),
        ("num_attention_heads", "n_heads"),
        ("num_hidden_layers", "n_layers"),
    ):
        config.only(name, config.size(own), why=f"{own!r} says so")
    config.ignore(
        "alibi_bias_max attention_layer_norm_with_affine embedding_dropout flash_attention "
        "init_cutoff_factor init_device init_fn init_std mlp_ratio precision residual_dropout"
    )


def attention_sizes(config: Config) -> AttentionSizes:
    """`n_kv_heads` may be null, which stands for as many as `n_heads`; it may not be absent."""
    head_dim = config.divides("d_model", "n_heads")
    heads = config.size("n_heads")
    kv_heads = (
        heads if config.null("n_kv_heads") else heads // config.divides("n_heads", "n_kv_heads")
    )
    if config.given("multi_query_attention") and kv_heads != heads:
        # The authors' code takes false for as many as `n_heads`, and stops where they differ.
        raise config.error("multi_query_attention", f"null, as 'n_kv_heads' is {kv_heads}")
    return AttentionSizes(
        hidden=config.size("d_model"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=config.number("rms_norm_eps"),
    )


def table_rows(config: Config) -> int:
    """`embedding_size` is `vocab_size` padded; null stands for no padding."""
    vocab_size = config.size("vocab_size")
    if config.null("embedding_size"):
        return vocab_size
    rows = config.size("embedding_size")
    if rows < vocab_size:
        raise config.error("embedding_size", f"at least 'vocab_size', which is {vocab_size}")
    return rows


def rename(parameter: str) -> str:
    if parameter in ENDS:
        return ENDS[parameter]
    _, index, part = parameter.removesuffix(".weight").split(".", 2)
    return f"model.transformer.blocks.{index}.{PARTS[part]}.weight"
