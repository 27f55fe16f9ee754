"""Mixtures of experts as people write them: routers, ways to run experts, and near misses.

A router maps logits f32 [B, T, E] to (weights [B, T, k], experts i64 [B, T, k]); a spelling runs
experts, given a module `m` with their weights, on x [B, T, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Router = Callable[["Mixture", Tensor], tuple[Tensor, Tensor]]
Spelling = Callable[["Mixture", Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    hidden: int = 12
    inner: int = 10
    experts: int = 6
    top_k: int = 2
    groups: int = 3
    kept: int = 2
    biases: bool = False


class One(nn.Module):
    """One gated expert."""

    def __init__(self, s: Sizes, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(s.hidden, s.inner, bias=s.biases) for _ in range(2))
        self.down = nn.Linear(s.inner, s.hidden, bias=s.biases)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Merged(One):
    """Gate and up in one projection, up first."""

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.both = nn.Linear(s.hidden, 2 * s.inner, bias=s.biases)
        del self.gate, self.up

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, -1)
        return self.down(up * self.act(gate))


class Mixture(nn.Module):
    """x [B, T, D] -> [B, T, D]"""

    def __init__(self, sizes: Sizes, router: Router, spelling: Spelling) -> None:
        super().__init__()
        s = self.sizes = sizes
        self.router, self.spelling = router, spelling
        self.gate = nn.Linear(s.hidden, s.experts, bias=False)
        self.bias = nn.Parameter(torch.randn(s.experts) * 0.1)
        self.each = nn.ModuleList(One(s) for _ in range(s.experts))
        self.merged = nn.ModuleList(Merged(s) for _ in range(s.experts))
        shape = (s.experts, s.inner, s.hidden)
        self.w_gate, self.w_up = (nn.Parameter(torch.randn(shape)) for _ in range(2))
        self.w_down = nn.Parameter(torch.randn(s.experts, s.hidden, s.inner))
        self.w_both = nn.Parameter(torch.randn(s.experts, 2 * s.inner, s.hidden))
        self.w_both_turned = nn.Parameter(torch.randn(s.experts, s.hidden, 2 * s.inner))
        self.w_down_turned = nn.Parameter(torch.randn(s.experts, s.inner, s.hidden))
        self.b_both = nn.Parameter(torch.randn(s.experts, 2 * s.inner))
        self.b_down = nn.Parameter(torch.randn(s.experts, s.hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(self, x, *self.router(self, self.gate(x)))


# Routers.


def softmax(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    values, index = z.softmax(-1).topk(m.sizes.top_k, -1)
    return values, index


def softmax_renormalised(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    values, index = torch.topk(F.softmax(z, dim=-1, dtype=torch.float), m.sizes.top_k)
    values /= values.sum(-1, keepdim=True)
    return values, index


def softmax_of_chosen(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    values, index = z.topk(m.sizes.top_k, -1)
    return values.softmax(-1), index


def softmax_chosen_by_logits(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    index = z.sort(dim=-1, descending=True).indices[..., : m.sizes.top_k]
    return z.softmax(-1).gather(-1, index) * 1.5, index


def sigmoid_of_chosen(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    values, index = z.topk(m.sizes.top_k, -1)
    return values.sigmoid(), index


def sigmoid_biased(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    scores = z.sigmoid()
    index = (scores + m.bias).topk(m.sizes.top_k, -1).indices
    weights = scores.gather(-1, index)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, index


def grouped(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    s = m.sizes
    scores = z.sigmoid()
    biased = (scores + m.bias).unflatten(-1, (s.groups, -1))
    best = biased.topk(2, -1)[0].sum(-1).topk(s.kept, -1, sorted=False)[1]
    kept = torch.zeros_like(biased[..., 0]).scatter_(-1, best, 1)
    kept = kept.unsqueeze(-1).expand_as(biased).flatten(-2)
    index = biased.flatten(-2).masked_fill(~kept.bool(), -torch.inf).topk(s.top_k, -1).indices
    return scores.gather(-1, index) * 0.5, index


ROUTERS: list[Router] = [
    softmax,
    softmax_renormalised,
    softmax_of_chosen,
    softmax_chosen_by_logits,
    sigmoid_of_chosen,
    sigmoid_biased,
    grouped,
]


# Ways to run the experts.


def dense_gate(m: Mixture, w: Tensor, index: Tensor) -> Tensor:
    zeros = w.new_zeros((*w.shape[:-1], m.sizes.experts))
    return zeros.scatter(-1, index, w)


def einsum_all(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    h = F.silu(torch.einsum("btd,efd->btef", x, m.w_gate))
    h = h * torch.einsum("btd,efd->btef", x, m.w_up)
    return torch.einsum("btef,edf,bte->btd", h, m.w_down, dense_gate(m, w, index))


def weighted_before_down(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    gate, up = torch.einsum("btd,edf->betf", x, m.w_both_turned).chunk(2, -1)
    h = F.gelu(gate) * up * dense_gate(m, w, index).transpose(1, 2).unsqueeze(-1)
    return torch.einsum("betf,efd->btd", h, m.w_down_turned)


def bmm_all(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    both = torch.bmm(rows.expand(m.sizes.experts, -1, -1), m.w_both.transpose(1, 2))
    gate, up = both.chunk(2, -1)
    y = torch.bmm(F.silu(gate) * up, m.w_down.transpose(1, 2))
    by = dense_gate(m, w, index).reshape(-1, m.sizes.experts).t().unsqueeze(-1)
    return (y * by).sum(0).view_as(x)


def bmm_biased(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).repeat(m.sizes.experts, 1, 1)
    both = torch.bmm(rows, m.w_both_turned) + m.b_both[:, None]
    up, gate = both.split(m.sizes.inner, -1)
    y = torch.bmm(up * F.silu(gate), m.w_down_turned) + m.b_down[:, None, :]
    by = dense_gate(m, w, index).flatten(0, 1).transpose(0, 1)[..., None]
    return (y * by).sum(dim=0).view(1, -1, m.sizes.hidden)


def masked_loop(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.each):
        y = y + expert(x) * (w * (index == e)).sum(-1, keepdim=True)
    return y


def index_add_loop(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    rows, index, w = x.view(-1, x.shape[-1]), index.flatten(0, 1), w.flatten(0, 1)
    y = torch.zeros_like(rows)
    for e, expert in enumerate(m.each):
        row, slot = torch.where(index == e)
        if row.numel() == 0:
            continue
        y.index_add_(0, row, expert(rows[row]) * w[row, slot, None])
    return y.view_as(x)


def nonzero_loop(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    rows, w = x.reshape(-1, x.shape[-1]), w.flatten(0, 1)
    y = torch.zeros_like(rows)
    hot = F.one_hot(index.flatten(0, 1), m.sizes.experts).permute(2, 1, 0)
    for e in torch.greater(hot.sum(dim=(-1, -2)), 0).nonzero():
        slot, row = torch.where(hot[e].squeeze(0))
        chosen = rows[None, row].reshape(-1, x.shape[-1])
        y = y.index_add(0, row, m.merged[e](chosen) * w[row, slot, None])
    return y.reshape(x.shape)


def where_loop(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    gate = dense_gate(m, w, index)
    for e, expert in enumerate(m.merged):
        y = torch.where((index == e).any(-1, keepdim=True), y + gate[..., e, None] * expert(x), y)
    return y


def masked_inputs(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.each):
        mask = (index == e).any(-1, keepdim=True)
        by = torch.where(index == e, w, 0.0).sum(-1, keepdim=True)
        y += expert(x * mask) * by
    return y


def dispatch_combine(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    hot = F.one_hot(index, m.sizes.experts).to(x.dtype)
    sent = torch.einsum("btke,btd->ebtd", hot, x)
    h = F.silu(torch.einsum("ebtd,efd->ebtf", sent, m.w_gate))
    h = h * torch.einsum("ebtd,efd->ebtf", sent, m.w_up)
    y = torch.einsum("ebtf,edf->ebtd", h, m.w_down)
    return torch.einsum("btke,btk,ebtd->btd", hot, w, y)


def gather_weights(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    gate = torch.einsum("btd,btkfd->btkf", x, m.w_gate[index])
    up = (m.w_up[index] @ x[:, :, None, :, None]).squeeze(-1)
    y = torch.einsum("btkf,btkdf->btkd", F.silu(gate) * up, m.w_down[index])
    return (y * w.unsqueeze(-1)).sum(-2)


def gather_flat(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    k, size = index.shape[-1], x.shape[-1]
    rows = x.reshape(-1, size).repeat_interleave(k, dim=0)
    experts = index.reshape(-1)
    both = torch.bmm(m.w_both[experts], rows.unsqueeze(-1)).squeeze(-1)
    gate, up = both.chunk(2, -1)
    y = torch.bmm(m.w_down[experts], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    y = y * w.reshape(-1, 1)
    return y.view(x.shape[1], k, size).sum(1).unsqueeze(0)


def outputs_stacked(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    y = torch.stack([expert(x) for expert in m.each], 2)
    return (y * dense_gate(m, w, index).unsqueeze(-1)).sum(2)


def outputs_picked(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    y = torch.stack([expert(x) for expert in m.merged], 2)
    chosen = y.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
    return torch.einsum("btkd,btk->btd", chosen, w)


def weights_stacked(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    gate, up, down = (
        torch.stack([getattr(e, name).weight for e in m.each]) for name in ("gate", "up", "down")
    )
    h = F.silu(torch.einsum("btd,efd->btef", x, gate)) * torch.einsum("btd,efd->btef", x, up)
    y = torch.einsum("btef,edf->bted", h, down)
    hot = (index.unsqueeze(-1) == torch.arange(m.sizes.experts)).float()
    return torch.einsum("bted,bte->btd", y, (hot * w.unsqueeze(-1)).sum(2))


SPELLINGS: list[Spelling] = [
    einsum_all,
    weighted_before_down,
    bmm_all,
    bmm_biased,
    masked_loop,
    index_add_loop,
    nonzero_loop,
    where_loop,
    masked_inputs,
    dispatch_combine,
    gather_weights,
    gather_flat,
    outputs_stacked,
    outputs_picked,
    weights_stacked,
]


# Near misses: each differs from a mixture of experts by one thing.


def weights_twice(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    return masked_loop(m, x, w * w, index)


def expert_skipped(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(1, m.sizes.experts):
        y = y + m.each[e](x) * (w * (index == e)).sum(-1, keepdim=True)
    return y


def expert_twice(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    return masked_loop(m, x, w, index) + m.each[0](x) * (w * (index == 0)).sum(-1, keepdim=True)


def another_activation(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.each):
        act = F.relu if e == 2 else F.silu
        one = expert.down(act(expert.gate(x)) * expert.up(x))
        y = y + one * (w * (index == e)).sum(-1, keepdim=True)
    return y


def only_the_best(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    return masked_loop(m, x, w[..., :1], index[..., :1])


def weights_swapped(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    return masked_loop(m, x, w.flip(-1), index)


def another_input(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    h = F.silu(torch.einsum("btd,efd->btef", x, m.w_gate))
    h = h * torch.einsum("btd,efd->btef", x.tanh(), m.w_up)
    return torch.einsum("btef,edf,bte->btd", h, m.w_down, dense_gate(m, w, index))


def not_gated(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    h = F.silu(torch.einsum("btd,efd->btef", x, m.w_gate))
    return torch.einsum("btef,edf,bte->btd", h, m.w_down, dense_gate(m, w, index))


def threshold(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    scores = m.gate(x).softmax(-1)
    return einsum_of(m, x, scores * (scores >= w[..., -1:]))


def everyone(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    return einsum_of(m, x, m.gate(x).softmax(-1))


def einsum_of(m: Mixture, x: Tensor, gate: Tensor) -> Tensor:
    h = F.silu(torch.einsum("btd,efd->btef", x, m.w_gate))
    h = h * torch.einsum("btd,efd->btef", x, m.w_up)
    return torch.einsum("btef,edf,bte->btd", h, m.w_down, gate)


NEAR_MISSES: list[Spelling] = [
    weights_twice,
    expert_skipped,
    expert_twice,
    another_activation,
    only_the_best,
    weights_swapped,
    another_input,
    not_gated,
    threshold,
    everyone,
]
