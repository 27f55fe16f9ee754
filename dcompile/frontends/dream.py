"""Dream: Qwen2's decoder without the causal mask; the logits of a position predict the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dcompile.frontends.base import Config, Definition, rope_theta, rotary_dim
from dcompile.frontends.layers import (
    Attention,
    AttentionSizes,
    Decoder,
    DecoderLayer,
    DecoderSizes,
    GatedFFN,
)

DEFAULTS = {"block_length": 32, "policy": "threshold", "cache": "dual", "threshold": 0.9}


def read(config: Config) -> Definition:
    """The model that a `DreamModel` config describes."""
    refuse_what_is_not_computed(config)
    attention = attention_sizes(config)
    model = Dream(
        decoder=DecoderSizes(
            vocab=config.size("vocab_size"),
            hidden=attention.hidden,
            eps=attention.eps,
            rotary_dim=rotary_dim(config, attention.head_dim, 1.0),
            theta=rope_theta(config),
        ),
        attention=attention,
        inner=config.size("intermediate_size"),
    )
    return Definition(
        family="dream",
        vocab_size=model.decoder.vocab,
        max_positions=config.size("max_position_embeddings", 0) or None,
        layer_kinds=("dense",) * config.size("num_hidden_layers", most=1000),
        defaults=DEFAULTS,
        build=model.build,
        rename=rename,
        shift=True,
        tied=config.flag("tie_word_embeddings", False),
    )


@dataclass(frozen=True)
class Dream:
    decoder: DecoderSizes
    attention: AttentionSizes
    inner: int

    def build(self, layers: Sequence[int], dtype: torch.dtype) -> Decoder:
        return Decoder(self.decoder, dtype, (self.layer(dtype) for _ in layers))

    def layer(self, dtype: torch.dtype) -> DecoderLayer:
        hidden, eps = self.decoder.hidden, self.decoder.eps
        mlp = GatedFFN(hidden, self.inner, dtype)
        return DecoderLayer(hidden, eps, dtype, Attention(self.attention, dtype), mlp)


def refuse_what_is_not_computed(config: Config) -> None:
    config.only("hidden_act", "silu")
    config.only("attention_bias", True)
    config.only("use_mrope", False)
    config.only("use_sliding_window", False)


def attention_sizes(config: Config) -> AttentionSizes:
    head_dim = config.divides("hidden_size", "num_attention_heads")
    config.only("head_dim", head_dim)
    config.divides("num_attention_heads", "num_key_value_heads")
    return AttentionSizes(
        hidden=config.size("hidden_size"),
        heads=config.size("num_attention_heads"),
        kv_heads=config.size("num_key_value_heads"),
        head_dim=head_dim,
        eps=config.number("rms_norm_eps"),
        bias=True,
    )


def rename(parameter: str) -> str:
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"
