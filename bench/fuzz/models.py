"""Random small models from a grammar, as data: a specification can be stored, shrunk and built again.

Most of the grammar is what position-wise code, attention and mixtures of experts are written like; some of it
is that with one thing changed (the smallest k, another order, an epsilon), which a pass must not take for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spec = dict[str, Any]

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "abs": torch.abs,
    "neg": lambda x: -x,
    "sin": torch.sin,
    "exp": lambda x: torch.exp(-x.abs()),
    "square": lambda x: x * x * 0.5,
    "clamp": lambda x: x.clamp(-0.7, 0.9),
    "leaky": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked": lambda x: x.masked_fill(x < -0.5, 0.25),
    "reciprocal": lambda x: 1.0 / (1.5 + x.abs()),
    "rsqrt": lambda x: (x * x + 0.3).rsqrt(),
    "softplus": F.softplus,
    "maximum": lambda x: torch.maximum(x, -0.5 * x),
    "round_trip": lambda x: x.to(torch.float32).mul(1.25).to(x.dtype),
    "pow": lambda x: x.abs() ** 1.5,
    "log": lambda x: torch.log1p(x.abs()),
    "subtract": lambda x: 1.0 - x,
    "lerp": lambda x: torch.lerp(x, x.tanh(), 0.25),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
}
ACROSS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "softmax_f32": lambda x: x.softmax(-1, dtype=torch.float32).to(x.dtype),
    "log_softmax": lambda x: x.log_softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (x.shape[-1],)),
    "rms_norm": lambda x: F.rms_norm(x, (x.shape[-1],), eps=1e-5),
    "rms_halves": lambda x: F.rms_norm(x.unflatten(-1, (2, -1)), (x.shape[-1] // 2,)).flatten(-2),
    "rms_by_hand": lambda x: (
        x * (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype)
    ),
    "unit": lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.1),
    "center": lambda x: x - x.mean(-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(-1) * 0.3,
    "roll": lambda x: torch.cat((x[..., -1:], x[..., :-1]), -1),
    "flip": lambda x: x.flip(-1),
    "swap_halves": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "turn_halves": lambda x: torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1),
    "product_of_halves": lambda x: torch.cat((x.chunk(2, -1)[0] * x.chunk(2, -1)[1],) * 2, -1),
    "transpose_inside": lambda x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2),
    "strided": lambda x: torch.cat((x[..., ::2], x[..., 1::2]), -1),
    "largest": lambda x: torch.where(x >= x.topk(3, -1).values[..., -1:], x, torch.zeros_like(x)),
    "sort": lambda x: x.sort(-1).values,
    "maximum_of": lambda x: x - x.amax(-1, keepdim=True),
    "outer": lambda x: (x[..., :, None] * x[..., None, :]).mean(-1),
}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid}


def chance(rng: random.Random, *weighted: tuple[Any, float]) -> Any:
    return rng.choices([v for v, _ in weighted], [w for _, w in weighted])[0]


def draw(seed: int) -> Spec:
    """A model's specification; equal seeds give equal ones."""
    rng = random.Random(seed)
    hidden = rng.choice([8, 12, 16])
    layers = [draw_layer(rng, hidden) for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    return {
        "seed": seed,
        "vocab": rng.choice([17, 32, 41]),
        "hidden": hidden,
        "block": rng.choice([2, 4, 5]),
        "mask": chance(
            rng, ("none", 3), ("full", 1), ("zeros", 1), ("blocks", 1.5), ("blocks_f", 1)
        ),
        "positions": chance(rng, ("none", 3), ("table", 1), ("sine", 1)),
        "dtype": chance(rng, ("float32", 4), ("bfloat16", 1)),
        "layers": layers,
        "before": draw_chain(rng, 2),
        "head": chance(
            rng, ("plain", 3), ("bias", 1), ("tied", 1), ("cap", 1), ("scaled", 1), ("f32", 1)
        ),
        "norm": rng.choice(["rms", "layer", "rms_plus_one", "none"]),
        "returns": rng.choice(["tensor", "tensor", "tuple", "dict"]),
    }


def draw_chain(rng: random.Random, most: int) -> list[str]:
    names = [*ELEMENTWISE, *ACROSS, "linear", "linear_bias", "einsum", "scale", "by_token"]
    return [rng.choice(names) for _ in range(rng.randint(0, most))]


def draw_layer(rng: random.Random, hidden: int) -> Spec:
    heads = rng.choice([1, 2, 4])
    width = rng.choice([4, 6, 8])
    attention = {
        "heads": heads,
        "kv": rng.choice([g for g in (1, 2, 4) if heads % g == 0]),
        "width": width,
        "rope": chance(
            rng,
            ("none", 1),
            ("half", 4),
            ("partial", 1),
            ("pairs", 1),
            ("backwards", 1),
            ("q", 1),
            ("v", 0.5),
        ),
        "qk_norm": chance(
            rng, ("none", 3), ("rms", 2), ("rms_f", 1), ("after", 1), ("whole", 1), ("layer", 0.5)
        ),
        "bias": rng.random() < 0.3,
        "scale": chance(rng, (None, 3), (0.5, 1)),
        "gqa": chance(rng, ("flag", 4), ("repeat", 0.3), ("expand", 4)),
        "fused": rng.random() < 0.3,
        "gate": rng.random() < 0.2,
        "inside": chance(rng, ("none", 8), ("q", 1), ("v", 1), ("turned", 1)),
        "chain": draw_chain(rng, 1),
    }
    mlp: Spec = {
        "kind": chance(rng, ("gated", 3), ("plain", 1), ("moe", 4), ("chain", 2)),
        "inner": rng.choice([6, 8, 10]),
        "activation": chance(rng, ("silu", 4), ("gelu", 1), ("relu", 1), ("sigmoid", 1)),
        "swapped": rng.random() < 0.2,
        "twice": rng.random() < 0.15,
        "packed": rng.random() < 0.3,
        "chain": draw_chain(rng, 4),
    }
    if mlp["kind"] == "moe":
        mlp |= draw_moe(rng)
    return {
        "attention": attention if rng.random() < 0.8 else None,
        "mlp": mlp,
        "norm": chance(
            rng, ("rms", 4), ("layer", 1), ("rms_plus_one", 1), ("by_hand", 1), ("none", 0.5)
        ),
        "order": chance(rng, ("pre", 4), ("post", 1), ("parallel", 1), ("no_residual", 0.5)),
        "eps": rng.choice([1e-6, 1e-5, 1e-2]),
    }


def draw_moe(rng: random.Random) -> Spec:
    experts = rng.choice([4, 6, 8])
    return {
        "experts": experts,
        "top_k": rng.choice([1, 2, 3]),
        "score": chance(rng, ("softmax", 3), ("sigmoid", 2), ("sigmoid_bias", 2), ("logits", 0.7)),
        "groups": rng.choice([1, 1, 2]),
        "renormalize": chance(
            rng,
            ("none", 2),
            ("sum", 2),
            ("sum_eps", 2),
            ("other_eps", 1),
            ("softmax", 1),
            ("no_keepdim", 0),
        ),
        "factor": rng.choice([1.0, 1.0, 2.5]),
        "smallest": rng.random() < 0.15,
        "background": rng.choice([0.0, 0.0, 0.0, 0.0, 0.05]),
        "spelled": chance(rng, ("einsum", 5), ("loop", 1), ("gathered", 1.5), ("bmm", 1)),
        "shared": rng.random() < 0.3,
        "biased_weights": rng.random() < 0.15,
    }


class Norm(nn.Module):
    def __init__(self, kind: str, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.kind, self.size, self.eps = kind, size, eps
        if kind != "none":
            self.weight = nn.Parameter(1 + 0.2 * torch.randn(size))
        if kind == "layer":
            self.bias = nn.Parameter(0.2 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "layer":
            return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
        if self.kind == "rms_plus_one":
            return F.rms_norm(x, (self.size,), eps=self.eps) * (0.5 + self.weight)
        if self.kind == "by_hand":
            wide = x.float()
            scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weight * scaled.to(x.dtype)
        return F.rms_norm(x, (self.size,), self.weight, self.eps)


class Chain(nn.Module):
    def __init__(self, names: list[str], size: int, vocab: int) -> None:
        super().__init__()
        self.names = names
        self.parts = nn.ModuleList()
        for name in names:
            part: nn.Module = nn.Identity()
            if name.startswith("linear"):
                part = nn.Linear(size, size, bias=name == "linear_bias")
            elif name in ("einsum", "scale"):
                part = nn.ParameterList(
                    [torch.randn(size, size) * size**-0.5, 1 + torch.randn(size)]
                )
            elif name == "by_token":
                part = nn.Embedding(vocab, size)
            self.parts.append(part)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for name, part in zip(self.names, self.parts, strict=True):
            if name.startswith("linear"):
                x = part(x)
            elif name == "einsum":
                x = torch.einsum("btd,de->bte", x, part[0])
            elif name == "scale":
                x = x * part[1]
            elif name == "by_token":
                x = torch.where((ids % 3 == 0)[..., None], x, part(ids).to(x.dtype))
            else:
                x = (ELEMENTWISE.get(name) or ACROSS[name])(x)
        return x


def angles(ids: Tensor, dim: int) -> Tensor:
    positions = torch.arange(ids.shape[1], dtype=torch.float32)
    steps = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return positions[:, None] * (1.0 / 100.0**steps)


class Attention(nn.Module):
    def __init__(self, spec: Spec, hidden: int, vocab: int) -> None:
        super().__init__()
        self.spec = spec
        heads, shared, width = spec["heads"], spec["kv"], spec["width"]
        sizes = [heads * width, shared * width, shared * width]
        if spec["fused"]:
            self.qkv = nn.Linear(hidden, sum(sizes), bias=spec["bias"])
        else:
            self.q, self.k, self.v = (nn.Linear(hidden, n, bias=spec["bias"]) for n in sizes)
        self.sizes = sizes
        self.out = nn.Linear(heads * width, hidden, bias=spec["bias"])
        if spec["gate"]:
            self.gate = nn.Linear(hidden, heads * width, bias=False)
        kind, whole = spec["qk_norm"], spec["qk_norm"] == "whole"
        if kind != "none":
            norm = {"rms_f": "by_hand", "layer": "layer"}.get(kind, "rms")
            self.q_norm = Norm(norm, heads * width if whole else width, 1e-6)
            self.k_norm = Norm(norm, shared * width if whole else width, 1e-6)
        self.chain = Chain(spec["chain"], hidden, vocab)

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        spec = self.spec
        x = self.chain(x, ids)
        whole = (
            self.qkv(x).split(self.sizes, -1)
            if spec["fused"]
            else (self.q(x), self.k(x), self.v(x))
        )
        if spec["qk_norm"] == "whole":
            whole = (self.q_norm(whole[0]), self.k_norm(whole[1]), whole[2])
        q, k, v = (part.unflatten(-1, (-1, spec["width"])) for part in whole)
        if spec["inside"] == "q":
            q = ACROSS["transpose_inside"](q)
        elif spec["inside"] == "v":
            v = ACROSS["transpose_inside"](v)
        if spec["qk_norm"] in ("rms", "rms_f", "layer"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.turn(q, k, v, ids)
        if spec["inside"] == "turned":
            q, k = ACROSS["transpose_inside"](q), ACROSS["transpose_inside"](k)
        if spec["qk_norm"] == "after":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        times = spec["heads"] // spec["kv"]
        if times > 1 and spec["gqa"] == "repeat":
            k, v = (part.repeat_interleave(times, 1) for part in (k, v))
        elif times > 1 and spec["gqa"] == "expand":
            k, v = (part[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for part in (k, v))
        flag = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=spec["scale"], enable_gqa=flag)
        out = out.transpose(1, 2).flatten(2)
        if spec["gate"]:
            out = out * torch.sigmoid(self.gate(x))
        return self.out(out)

    def turn(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind = self.spec["rope"]
        if kind == "none":
            return q, k, v
        if kind == "q":
            return rotate(q, ids, "half"), k, v
        if kind == "v":
            return q, k, rotate(v, ids, "half")
        return rotate(q, ids, kind), rotate(k, ids, kind), v


def rotate(x: Tensor, ids: Tensor, kind: str) -> Tensor:
    width = x.shape[-1]
    dim = width // 2 // 2 * 2 if kind == "partial" else width
    turned, rest = x[..., :dim], x[..., dim:]
    angle = angles(ids, dim)
    if kind == "pairs":
        both = angle[..., None].expand(-1, -1, 2).flatten(-2)
        cos, sin = (f[:, None, :].to(x.dtype) for f in (both.cos(), both.sin()))
        other = torch.cat((-turned[..., 1::2, None], turned[..., ::2, None]), -1).flatten(-2)
    else:
        both = torch.cat((angle, angle), -1)
        cos, sin = (f[:, None, :].to(x.dtype) for f in (both.cos(), both.sin()))
        half = dim // 2
        other = torch.cat((-turned[..., half:], turned[..., :half]), -1)
        other = -other if kind == "backwards" else other
    out = turned * cos + other * sin
    return torch.cat((out, rest), -1) if dim < width else out


class Mixture(nn.Module):
    def __init__(self, spec: Spec, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        experts, inner = spec["experts"], spec["inner"]
        self.router = nn.Parameter(torch.randn(experts, hidden) * 0.7)
        self.expert_bias = nn.Parameter(torch.randn(experts) * 0.3)
        self.gate_proj = nn.Parameter(torch.randn(experts, inner, hidden) * hidden**-0.5)
        self.up_proj = nn.Parameter(torch.randn(experts, inner, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) * inner**-0.5)
        if spec["shared"]:
            self.shared = nn.Sequential(
                nn.Linear(hidden, inner), nn.SiLU(), nn.Linear(inner, hidden)
            )

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        logits = F.linear(x.float(), self.router.float())
        bias = self.expert_bias.float()
        if spec["score"] == "softmax":
            scores, ranked = (s := logits.softmax(-1)), s
        elif spec["score"] == "sigmoid":
            scores, ranked = (s := logits.sigmoid()), s
        elif spec["score"] == "sigmoid_bias":
            scores = logits.sigmoid()
            ranked = scores + bias
        else:
            scores, ranked = logits, logits
        if spec["groups"] > 1:
            grouped = ranked.unflatten(-1, (spec["groups"], -1))
            best = grouped.topk(2, -1).values.sum(-1).topk(1, -1).indices
            kept = torch.zeros_like(grouped[..., 0]).scatter(-1, best, 1.0)
            ranked = grouped.masked_fill(kept.unsqueeze(-1) == 0, -torch.inf).flatten(-2)
        k = min(spec["top_k"], spec["experts"] // spec["groups"])
        found = ranked.topk(k, -1, largest=not spec["smallest"] or spec["groups"] > 1)
        experts = found.indices
        own = spec["biased_weights"] or ranked is scores
        weights = found.values if own else scores.gather(-1, experts)
        kind = spec["renormalize"]
        if kind == "softmax":
            weights = weights.softmax(-1)
        elif kind != "none":
            eps = {"sum": 0.0, "sum_eps": 1e-20, "other_eps": 0.1}[kind]
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total + eps if eps else total)
        if spec["factor"] != 1.0:
            weights = weights * spec["factor"]
        return scores, weights, experts

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        scores, weights, experts = self.routed(x)
        activation = ACTIVATIONS[spec["activation"]]
        empty = torch.zeros_like(scores)
        if spec["background"]:
            empty = torch.full_like(scores, spec["background"])
        dense = empty.scatter(-1, experts, weights).to(x.dtype)
        if spec["spelled"] == "einsum":
            gate = torch.einsum("btd,efd->btef", x, self.gate_proj)
            up = torch.einsum("btd,efd->btef", x, self.up_proj)
            gate, up = (up, gate) if spec["swapped"] else (gate, up)
            hidden = activation(gate) * (gate if spec["twice"] else up)
            out = torch.einsum("btef,edf,bte->btd", hidden, self.down_proj, dense)
        elif spec["spelled"] == "gathered":
            flat, chosen = x[0], experts[0]
            gate = torch.einsum("td,tkfd->tkf", flat, self.gate_proj[chosen])
            up = torch.einsum("td,tkfd->tkf", flat, self.up_proj[chosen])
            each = torch.einsum("tkf,tkdf->tkd", activation(gate) * up, self.down_proj[chosen])
            out = (each * weights[0][..., None].to(x.dtype)).sum(1)[None]
        elif spec["spelled"] == "bmm":
            many = x[0].expand(spec["experts"], -1, -1)
            gate = torch.bmm(many, self.gate_proj.transpose(1, 2))
            up = torch.bmm(many, self.up_proj.transpose(1, 2))
            each = torch.bmm(activation(gate) * up, self.down_proj.transpose(1, 2))
            out = (each * dense[0].T[..., None]).sum(0)[None]
        else:
            out = torch.zeros_like(x)
            for e in range(spec["experts"]):
                inner = activation(F.linear(x, self.gate_proj[e])) * F.linear(x, self.up_proj[e])
                out = out + F.linear(inner, self.down_proj[e]) * dense[..., e : e + 1]
        return out + self.shared(x) if spec["shared"] else out


class FeedForward(nn.Module):
    def __init__(self, spec: Spec, hidden: int, vocab: int) -> None:
        super().__init__()
        self.spec = spec
        inner = spec["inner"]
        if spec["kind"] == "chain":
            self.chain = Chain(spec["chain"], hidden, vocab)
        elif spec["kind"] == "moe":
            self.moe = Mixture(spec, hidden)
        elif spec["kind"] == "gated" and spec["packed"]:
            self.both = nn.Linear(hidden, 2 * inner, bias=False)
        elif spec["kind"] == "gated":
            self.gate, self.up = (nn.Linear(hidden, inner, bias=spec["twice"]) for _ in range(2))
        else:
            self.up = nn.Linear(hidden, inner)
        if spec["kind"] in ("gated", "plain"):
            self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        spec, activation = self.spec, ACTIVATIONS[self.spec["activation"]]
        if spec["kind"] == "chain":
            return self.chain(x, ids)
        if spec["kind"] == "moe":
            return self.moe(x)
        if spec["kind"] == "plain":
            return self.down(activation(self.up(x)))
        gate, up = self.both(x).chunk(2, -1) if spec["packed"] else (self.gate(x), self.up(x))
        gate, up = (up, gate) if spec["swapped"] else (gate, up)
        shown = activation(gate)
        inner = shown * up
        return self.down(inner + 0.1 * shown if spec["twice"] else inner)


class Layer(nn.Module):
    def __init__(self, spec: Spec, hidden: int, vocab: int) -> None:
        super().__init__()
        self.order = spec["order"]
        self.first = Norm(spec["norm"], hidden, spec["eps"])
        self.second = Norm(spec["norm"], hidden, spec["eps"])
        self.attention = Attention(spec["attention"], hidden, vocab) if spec["attention"] else None
        self.mlp = FeedForward(spec["mlp"], hidden, vocab)

    def mixed(self, x: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        return x * 0.5 if self.attention is None else self.attention(x, ids, mask)

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        if self.order == "post":
            x = self.first(x + self.mixed(x, ids, mask))
            return self.second(x + self.mlp(x, ids))
        if self.order == "parallel":
            normed = self.first(x)
            return x + self.mixed(normed, ids, mask) + self.mlp(normed, ids)
        if self.order == "no_residual":
            return self.mlp(self.second(self.mixed(self.first(x), ids, mask)), ids)
        x = x + self.mixed(self.first(x), ids, mask)
        return x + self.mlp(self.second(x), ids)


class Model(nn.Module):
    """ids i64 [1, T] -> logits [1, T, V], as a specification says."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        torch.manual_seed(spec["seed"])
        self.spec = spec
        vocab, hidden = spec["vocab"], spec["hidden"]
        self.embed = nn.Embedding(vocab, hidden)
        self.table = nn.Embedding(64, hidden)
        self.before = Chain(spec["before"], hidden, vocab)
        self.layers = nn.ModuleList(Layer(each, hidden, vocab) for each in spec["layers"])
        self.norm = Norm(spec["norm"], hidden)
        self.head = nn.Linear(hidden, vocab, bias=spec["head"] == "bias")

    def attention_mask(self, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        kind, length = self.spec["mask"], ids.shape[1]
        if kind == "none":
            return None
        if kind == "full":
            return torch.ones(length, length, dtype=torch.bool)
        if kind == "zeros":
            return torch.zeros(length, length, dtype=dtype)
        block = torch.arange(length) // self.spec["block"]
        allowed = block[None, :] <= block[:, None]
        if kind == "blocks":
            return allowed
        return torch.zeros(length, length, dtype=dtype).masked_fill(~allowed, float("-inf"))

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        if self.spec["positions"] == "table":
            x = x + self.table(torch.arange(ids.shape[1]))
        elif self.spec["positions"] == "sine":
            angle = angles(ids, x.shape[-1])
            x = x + torch.cat((angle.sin(), angle.cos()), -1).to(x.dtype)
        x = self.before(x, ids)
        mask = self.attention_mask(ids, x.dtype)
        for layer in self.layers:
            x = layer(x, ids, mask)
        x = self.norm(x)
        kind = self.spec["head"]
        weight = self.embed.weight if kind == "tied" else self.head.weight
        logits = F.linear(x, weight, self.head.bias)
        if kind == "cap":
            logits = 3.0 * torch.tanh(logits / 3.0)
        elif kind == "scaled":
            logits = logits * 0.7
        elif kind == "f32":
            logits = logits.float()
        return {"tensor": logits, "tuple": (logits, x), "dict": {"logits": logits}}[
            self.spec["returns"]
        ]


def build(spec: Spec) -> Model:
    return Model(spec).to(getattr(torch, spec["dtype"])).eval().requires_grad_(False)


def simpler(spec: Spec) -> list[Spec]:
    """Specifications with one thing less, most first."""
    out = []
    for i in range(len(spec["layers"])):
        out.append({**spec, "layers": spec["layers"][:i] + spec["layers"][i + 1 :]})
    plain = {"mask": "none", "positions": "none", "dtype": "float32", "before": [], "head": "plain"}
    plain |= {"norm": "none", "returns": "tensor"}
    out += [{**spec, key: value} for key, value in plain.items() if spec[key] != value]
    for i, layer in enumerate(spec["layers"]):
        for less in simpler_layer(layer):
            out.append({**spec, "layers": [*spec["layers"][:i], less, *spec["layers"][i + 1 :]]})
    return out


def simpler_layer(layer: Spec) -> list[Spec]:
    out = []
    if layer["attention"] is not None:
        out.append({**layer, "attention": None})
        plain = {"rope": "none", "qk_norm": "none", "bias": False, "scale": None, "fused": False}
        plain |= {"gate": False, "inside": "none", "chain": [], "heads": 1, "kv": 1}
        held = layer["attention"]
        for key, value in plain.items():
            if held[key] != value and not (key == "heads" and held["kv"] > 1):
                out.append({**layer, "attention": {**held, key: value}})
    mlp = layer["mlp"]
    if mlp["kind"] != "chain" or mlp["chain"]:
        out.append({**layer, "mlp": {**mlp, "kind": "chain", "chain": []}})
    if mlp["kind"] == "chain":
        for i in range(len(mlp["chain"])):
            less = mlp["chain"][:i] + mlp["chain"][i + 1 :]
            out.append({**layer, "mlp": {**mlp, "chain": less}})
    plain = {"swapped": False, "twice": False, "packed": False, "shared": False, "background": 0.0}
    plain |= {"groups": 1, "renormalize": "none", "factor": 1.0, "smallest": False}
    plain |= {"biased_weights": False, "activation": "silu"}
    for key, value in plain.items():
        if mlp.get(key, value) != value:
            out.append({**layer, "mlp": {**mlp, key: value}})
    for key, value in {"norm": "none", "order": "pre"}.items():
        if layer[key] != value:
            out.append({**layer, key: value})
    return out
