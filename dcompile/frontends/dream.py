"""Dream: Qwen2's decoder without the causal mask; the logits of a position predict the next."""

from __future__ import annotations

from functools import partial

from dcompile.frontends.base import Config, Defaults, Definition
from dcompile.frontends.layers import (
    Attention,
    DecoderSizes,
    GatedFFN,
)
from dcompile.frontends.layout import (
    Layout,
    attention_sizes,
    divided_head,
    full_attention_only,
    in_model,
    no_window,
)
from dcompile.frontends.rotary import rope_theta, whole_heads

DEFAULTS = Defaults(block_length=32, cache="dual", threshold=0.9)


def read(config: Config) -> Definition:
    """The model that a `DreamModel` config describes."""
    refuse_what_is_not_computed(config)
    attention = attention_sizes(config, divided_head(config), bias=True)
    kinds = ("dense",) * config.size("num_hidden_layers", most=1000)
    full_attention_only(config, len(kinds))
    inner = config.size("intermediate_size")
    layout = Layout(
        decoder=DecoderSizes(
            vocab=config.size("vocab_size"),
            hidden=attention.hidden,
            eps=attention.eps,
            rotary_dim=whole_heads(config, attention.head_dim),
            theta=rope_theta(config),
        ),
        kinds=kinds,
        attention=partial(Attention, attention),
        ffn={"dense": partial(GatedFFN, attention.hidden, inner)},
    )
    return Definition(
        family="dream",
        vocab_size=layout.decoder.vocab,
        max_positions=config.size("max_position_embeddings", 0) or None,
        layer_kinds=kinds,
        defaults=DEFAULTS,
        build=layout.build,
        rename=in_model,
        shift=True,
        tied=config.flag("tie_word_embeddings", False),
    )


def refuse_what_is_not_computed(config: Config) -> None:
    config.only("hidden_act", "silu")
    config.only("attention_bias", True)
    config.only("use_mrope", False)
    no_window(config)
