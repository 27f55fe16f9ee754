"""The kernels that multiply nothing: norms, rotary positions and cache writes, routing, gathers, commits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcompile.codegen.kernels import gather, norm_rope_write, norms, route, silu_mul
from dcompile.codegen.triton.variant import Lowering

Tensors = Mapping[str, Tensor]
R = {"R": 1}
KINDS = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A lowering with its operands and what float64 makes of them."""

    name: str
    lowering: Lowering
    operands: dict[str, Tensor]
    reference: Callable[[Tensors], dict[str, Tensor]]
    flops: float = 0.0


def cases(sizes: Mapping[str, int], rows: int, where: str, dtype: str) -> list[Case]:
    """Of a model with hidden, heads, groups, size, vocab, and experts and top where it has them."""
    kind = KINDS[dtype]
    draw = torch.Generator(where).manual_seed(1)

    def normal(*shape: int, of: torch.dtype = kind) -> Tensor:
        return torch.empty(shape, dtype=of, device=where).normal_(generator=draw)

    d, size = sizes["hidden"], sizes["size"]
    heads, groups, positions = sizes["heads"], sizes["groups"], 2 * rows
    row = torch.arange(rows, device=where)
    zeros = torch.zeros(rows, dtype=torch.int64, device=where)
    angles = torch.outer(
        torch.arange(positions, device=where).float(), normal(size // 2, of=torch.float32)
    )
    cos, sin = (torch.cat([f(angles)] * 2, -1).contiguous() for f in (torch.cos, torch.sin))
    how: dict[str, Any] = {"rows": R, "dtype": dtype}
    found = [
        Case(
            "add_rms_norm",
            norms.launches(**how, hidden=d, eps=1e-5, add=True),
            {
                **{n: normal(rows, d) for n in ("y", "total", "x", "r")},
                "w": normal(d),
            },
            _add_rms_norm,
        ),
        Case(
            "silu_mul",
            silu_mul.launches(**how, width=d),
            {n: normal(rows, d) for n in ("y", "gate", "up")},
            lambda t: {"y": torch.nn.functional.silu(t["gate"].double()) * t["up"].double()},
        ),
        Case(
            "gather_rows",
            gather.launches(**how, width=d),
            {"out": normal(rows, d), "x": normal(rows, d), "index": row.flip(0).contiguous()},
            lambda t: {"out": t["x"].double()[t["index"]]},
        ),
        Case(
            "norm_rope_write",
            norm_rope_write.launches(
                **how,
                heads=heads,
                groups=groups,
                size=size,
                positions=positions,
                rot=size,
                eps=1e-5,
                q_norm=True,
                k_norm=True,
            ),
            {
                "q": normal(rows, heads, size),
                **{n: normal(1, positions, groups, size) for n in ("keys", "values")},
                "qkv": normal(rows, (heads + 2 * groups) * size),
                **{n: normal(size) for n in ("q_norm", "k_norm")},
                **{"cos": cos, "sin": sin, "row_seq": zeros, "row_pos": row + rows // 2},
            },
            lambda t: _norm_rope_write(t, heads, groups, size),
        ),
    ]
    if "experts" in sizes:
        e, k = sizes["experts"], sizes["top"]
        found.append(
            Case(
                "route",
                route.launches(rows=R, num_experts=e, top_k=k, dtype="f32"),
                {
                    "weights": normal(rows, k, of=torch.float32),
                    "experts": torch.zeros(rows, k, dtype=torch.int32, device=where),
                    "logits": normal(rows, e, of=torch.float32),
                },
                lambda t: dict(
                    zip(
                        ("weights", "experts"),
                        torch.softmax(t["logits"].double(), -1).topk(k),
                        strict=True,
                    )
                ),
            )
        )
    return found


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()


def _add_rms_norm(t: Tensors) -> dict[str, Tensor]:
    total = (t["x"] + t["r"]).double()  # rounded, as it is stored
    return {"total": total, "y": normed(total, t["w"])}


def _norm_rope_write(t: Tensors, heads: int, groups: int, size: int) -> dict[str, Tensor]:
    parts = t["qkv"].double().unflatten(-1, (-1, size))
    q, k, v = parts.split((heads, groups, groups), 1)
    cos, sin = (t[n].double()[t["row_pos"]][:, None] for n in ("cos", "sin"))

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    keys, values = t["keys"].double().clone(), t["values"].double().clone()
    keys[0, t["row_pos"]], values[0, t["row_pos"]] = turn(normed(k, t["k_norm"])), v
    return {"q": turn(normed(q, t["q_norm"])), "keys": keys, "values": values}
