"""The pieces that the families share, in plain PyTorch.

Axes: B batch, T sequence, H heads, G key/value heads, K head size, D hidden, F inner size of a
feed-forward network, E experts, V vocabulary.  Weights are left as allocated: they come from a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear without the time spent on a random start."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding without the time spent on a random start."""

    def reset_parameters(self) -> None:
        pass


@dataclass(frozen=True)
class AttentionSizes:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qk_norm: bool = False  # RMSNorm over each head of q and k
    bias: bool = False  # on q, k and v


class Attention(nn.Module):
    """softmax(rope(q) rope(k)^T / sqrt(K)) v, with q, k, v projected apart."""

    def __init__(self, sizes: AttentionSizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = sizes
        hidden, width = sizes.hidden, sizes.head_dim
        inner, shared = sizes.heads * width, sizes.kv_heads * width
        self.q_proj = Linear(hidden, inner, bias=sizes.bias, dtype=dtype)
        self.k_proj = Linear(hidden, shared, bias=sizes.bias, dtype=dtype)
        self.v_proj = Linear(hidden, shared, bias=sizes.bias, dtype=dtype)
        self.o_proj = Linear(inner, hidden, bias=False, dtype=dtype)
        if sizes.qk_norm:
            self.q_norm = nn.RMSNorm(width, sizes.eps, dtype=dtype)
            self.k_norm = nn.RMSNorm(width, sizes.eps, dtype=dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        q, k, v = (
            split_heads(project(x), self.sizes.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.sizes.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out: Tensor = self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask))
        return out


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H*K] -> [B, T, H, K]"""
    return x.view(x.shape[0], x.shape[1], x.shape[2] // head_dim, head_dim)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, T, H, K], k and v [B, T, G, K], mask bool [T, T] (true: may attend) -> [B, T, H*K]"""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).flatten(2)


def rotary_table(ids: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/dim), both halves alike: float32 [T, 1, dim]"""
    positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
    exponents = torch.arange(0, dim, 2, device=ids.device, dtype=torch.float32) / dim
    angles = positions[:, None] * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), -1)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of x [B, T, H, K], as many as cos and sin have; in their dtype."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), -1)
    turned = cast(x, cos.dtype)
    half = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), -1)
    return cast(turned * cos + half * sin, x.dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype; where it has it already, nothing, so that the trace has no empty casts."""
    return x if x.dtype == dtype else x.to(dtype)


def block_causal(ids: Tensor, block_length: int) -> Tensor:
    """Which key a query may see, its own block and all before: bool [T, T]"""
    block = torch.arange(ids.shape[1], device=ids.device) // block_length
    return block[None, :] <= block[:, None]


class GatedFFN(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, inner, bias=False, dtype=dtype)
        self.up_proj = Linear(hidden, inner, bias=False, dtype=dtype)
        self.down_proj = Linear(inner, hidden, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


@dataclass(frozen=True)
class MoESizes:
    hidden: int
    inner: int
    experts: int
    top_k: int
    renormalize: bool
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    shared_inner: int = 0  # of the experts that every token passes; 0: none


class SoftmaxRouter(nn.Module):
    """The top k of softmax(x W^T), the softmax in float32 over all experts."""

    def __init__(self, sizes: MoESizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sizes.experts, sizes.hidden, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> each expert's weight, zero where not chosen: float32 [B, T, E]"""
        scores = F.linear(x, self.weight).softmax(-1, dtype=torch.float32)
        weights, experts = scores.topk(self.sizes.top_k, dim=-1)
        return scatter(scores, weights, experts, self.sizes)


class GroupedRouter(nn.Module):
    """The top k of sigmoid(x W^T) + bias within the best groups; weights are without the bias."""

    def __init__(self, sizes: MoESizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sizes.experts, sizes.hidden, dtype=dtype))
        # Rounded to bfloat16, the bias would choose other experts.
        self.expert_bias = nn.Parameter(torch.empty(sizes.experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> each expert's weight, zero where not chosen: float32 [B, T, E]"""
        scores = F.linear(cast(x, torch.float32), cast(self.weight, torch.float32)).sigmoid()
        biased = scores + self.expert_bias
        if self.sizes.groups > 1:
            biased = self.keep_best_groups(biased)
        experts = biased.topk(self.sizes.top_k, dim=-1).indices
        return scatter(scores, scores.gather(-1, experts), experts, self.sizes)

    def keep_best_groups(self, biased: Tensor) -> Tensor:
        """-inf outside the groups whose two best scores have the greatest sums: [B, T, E]"""
        batch, length, experts = biased.shape
        groups = self.sizes.groups
        grouped = biased.view(batch, length, groups, experts // groups)
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(self.sizes.kept_groups, dim=-1).indices
        kept = torch.zeros_like(group_scores).scatter(-1, best, 1.0)
        return grouped.masked_fill(kept.unsqueeze(-1) == 0, -torch.inf).flatten(-2)


def scatter(scores: Tensor, weights: Tensor, experts: Tensor, sizes: MoESizes) -> Tensor:
    """The chosen weights [B, T, k] (renormalised, scaled) at their experts: [B, T, E]"""
    if sizes.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if sizes.scale != 1.0:
        weights = weights * sizes.scale
    return torch.zeros_like(scores).scatter(-1, experts, weights)


class Experts(nn.Module):
    """The weighted sum of gated feed-forward networks, one an expert."""

    def __init__(self, sizes: MoESizes, dtype: torch.dtype) -> None:
        super().__init__()
        up, down = (sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner)
        self.gate_proj = nn.Parameter(torch.empty(sizes.experts, *up, dtype=dtype))
        self.up_proj = nn.Parameter(torch.empty(sizes.experts, *up, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(sizes.experts, *down, dtype=dtype))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [B, T, D], weights [B, T, E] -> [B, T, D]"""
        gate = torch.einsum("btd,efd->btef", x, self.gate_proj)
        up = torch.einsum("btd,efd->btef", x, self.up_proj)
        return torch.einsum("btef,edf,bte->btd", F.silu(gate) * up, self.down_proj, weights)


class MoE(nn.Module):
    """sum_e weight_e * expert_e(x), plus the shared experts where there are any."""

    def __init__(
        self,
        sizes: MoESizes,
        dtype: torch.dtype,
        router: type[SoftmaxRouter] | type[GroupedRouter],
    ) -> None:
        super().__init__()
        self.gate = router(sizes, dtype)
        self.experts = Experts(sizes, dtype)
        self.shared = sizes.shared_inner > 0
        if self.shared:
            self.shared_experts = GatedFFN(sizes.hidden, sizes.shared_inner, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts(x, cast(self.gate(x), x.dtype))
        return out + self.shared_experts(x) if self.shared else out


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))"""

    def __init__(
        self, hidden: int, eps: float, dtype: torch.dtype, attention: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden, eps, dtype=dtype)
        self.self_attn = attention
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps, dtype=dtype)
        self.mlp = mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *mask: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]"""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, *mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


@dataclass(frozen=True)
class DecoderSizes:
    vocab: int
    hidden: int
    eps: float
    rotary_dim: int
    theta: float
    block_length: int | None = None  # None: every position sees every other
    rotate_in_float32: bool = False  # else in the hidden state's dtype


class Numbered(nn.ModuleList):
    """Some of a model's layers, in order, each under its index in the whole model."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for index, layer in layers.items():
            self.add_module(str(index), layer)


class Decoder(nn.Module):
    """The whole sequence in, logits out; no cache."""

    def __init__(
        self, sizes: DecoderSizes, dtype: torch.dtype, layers: Mapping[int, DecoderLayer]
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = Embedding(sizes.vocab, sizes.hidden, dtype=dtype)
        self.layers = Numbered(layers)
        self.norm = nn.RMSNorm(sizes.hidden, sizes.eps, dtype=dtype)
        self.lm_head = Linear(sizes.hidden, sizes.vocab, bias=False, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids i64 [B, T] -> logits [B, T, V]"""
        x = self.embed_tokens(ids)
        cos, sin = rotary_table(ids, self.sizes.rotary_dim, self.sizes.theta)
        if not self.sizes.rotate_in_float32:
            cos, sin = cast(cos, x.dtype), cast(sin, x.dtype)
        block_length = self.sizes.block_length
        mask = () if block_length is None else (block_causal(ids, block_length),)
        for layer in self.layers:
            x = layer(x, cos, sin, *mask)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
