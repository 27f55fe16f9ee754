"""How a family's config lays out a decoder: its attention, its kinds of layers, the keys that many share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dcompile.frontends.base import COMPUTED, Config
from dcompile.frontends.layers import AttentionSizes, Decoder, DecoderLayer, DecoderSizes

Part = Callable[[torch.dtype], nn.Module]


@dataclass(frozen=True)
class Layout:
    """Layers of one attention; the kind of a layer says which feed-forward network it has."""

    decoder: DecoderSizes
    kinds: Sequence[str]  # one a layer
    attention: Part
    ffn: Mapping[str, Part]

    def build(self, layers: Sequence[int], dtype: torch.dtype) -> Decoder:
        """The plain module with the named layers, in order."""
        made = {i: self._layer(self.kinds[i], dtype) for i in layers}
        return Decoder(self.decoder, dtype, made)

    def _layer(self, kind: str, dtype: torch.dtype) -> DecoderLayer:
        hidden, eps = self.decoder.hidden, self.decoder.eps
        return DecoderLayer(hidden, eps, dtype, self.attention(dtype), self.ffn[kind](dtype))


def full_attention_only(config: Config, layers: int) -> None:
    """Refuse layers of any other kind, such as those that attend in a window."""
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        raise config.error("layer_types", f"{layers} times 'full_attention', {COMPUTED}")


def no_window(config: Config) -> None:
    """The size of a window says nothing unless `use_sliding_window` does."""
    config.only("use_sliding_window", False)
    config.ignore("sliding_window max_window_layers")


def divided_head(config: Config) -> int:
    """The size of a head where the hidden size is divided among them."""
    head_dim = config.divides("hidden_size", "num_attention_heads")
    config.only("head_dim", head_dim)
    return head_dim


def own_head(config: Config) -> int:
    """The size of a head where the config may say it apart from the hidden size, as Qwen3's does."""
    if config.given("head_dim"):
        return config.size("head_dim")
    return config.divides("hidden_size", "num_attention_heads")


def attention_sizes(
    config: Config, head_dim: int, *, qk_norm: bool = False, bias: bool = False
) -> AttentionSizes:
    """Heads that share keys and values in groups, under the keys of Llama and its followers."""
    config.divides("num_attention_heads", "num_key_value_heads")
    return AttentionSizes(
        hidden=config.size("hidden_size"),
        heads=config.size("num_attention_heads"),
        kv_heads=config.size("num_key_value_heads"),
        head_dim=head_dim,
        eps=config.number("rms_norm_eps"),
        qk_norm=qk_norm,
        bias=bias,
    )


def in_model(parameter: str) -> str:
    """A parameter's name where all but the vocabulary projection stands under `model.`."""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"
