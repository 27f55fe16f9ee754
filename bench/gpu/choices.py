"""The kernels that choose: routers of every kind and their limits, smoothing's mixture, the end of a turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dcompile.codegen.kernels import advance, gather, norms, route, route_limited, soft_embed
from dcompile.ir import operators
from dcompile.ir.operators.route_limited import route_limited as limited
from gpu.rows import KINDS, Case, R, Tensors, normed

B = {"B": 1}
SCALE = 2.5


def cases(sizes: Mapping[str, int], rows: int, where: str, dtype: str, arch: int) -> Iterator[Case]:
    """Of a model with hidden and vocab, and experts and top where it has them; references in float64."""
    draw = torch.Generator(where).manual_seed(2)
    kind = KINDS[dtype]

    def normal(*shape: int, of: torch.dtype = kind, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=of, device=where).normal_(generator=draw).mul_(scale)

    def whole(*shape: int, below: int, of: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(below, shape, generator=draw, device=where, dtype=of)

    d, v = sizes["hidden"], sizes["vocab"]
    yield Case(
        "rms_norm",
        norms.launches(rows=R, hidden=d, dtype=dtype, eps=1e-5),
        {"y": normal(rows, d), "x": normal(rows, d), "w": normal(d)},
        lambda t: {"y": normed(t["x"].double(), t["w"])},
    )
    yield Case(
        "canvas_embedding",
        gather.canvas_launches(rows=R, positions=rows, width=d, dtype=dtype),
        {
            **{"out": normal(rows, d), "table": normal(v, d), "canvas": whole(2, rows, below=v)},
            **{"row_seq": whole(rows, below=2), "row_pos": whole(rows, below=rows)},
        },
        lambda t: {"out": t["table"].double()[t["canvas"][t["row_seq"], t["row_pos"]]]},
    )
    yield Case(
        "soft_embed",
        soft_embed.launches(
            **{"rows": R, "vocab": v, "hidden": d, "width": d, "dtype": dtype, "arch": arch}
        ),
        {
            **{"y": normal(rows, d), "x": normal(rows, d), "w": normal(v, d, scale=d**-0.5)},
            **{"table": normal(v, d), "live": whole(rows, below=4) > 0},
            "weight": normal(rows, of=torch.float32),
        },
        _soft_embed,
        4.0 * rows * v * d,
    )
    yield _advance(where)
    if "experts" in sizes:
        yield from _routers(sizes["experts"], sizes["top"], d, rows, dtype, normal, whole)


def _routers(
    e: int, k: int, d: int, rows: int, dtype: str, normal: Any, whole: Any
) -> Iterator[Case]:
    groups = 4 if e % 4 == 0 and e > 4 else 2
    how: dict[str, Any] = {
        **{"num_experts": e, "top_k": k, "score": "sigmoid", "groups": groups},
        **{"kept_groups": groups // 2, "renormalize": True, "scale": SCALE, "bias": "f32"},
    }
    results = {
        "weights": normal(rows, k, of=torch.float32),
        "experts": whole(rows, k, below=e, of=torch.int32),
    }
    bias = normal(e, of=torch.float32, scale=0.1)
    grouped = (k, "sigmoid", groups, groups // 2, True, SCALE)
    yield Case(
        "route_grouped",
        route.launches(rows=R, dtype="f32", **how),
        {**results, "logits": normal(rows, e, of=torch.float32), "bias": bias},
        lambda t: _named(operators.ROUTE(t["logits"].cpu(), t["bias"].cpu(), *grouped)),
    )
    # Small whole numbers: the product is exact, so no choice hangs on the order of its sum.
    x, w = whole(rows, d, below=3) - 1, whole(e, d, below=3) - 1
    yield Case(
        "route_product",
        route.product_launches(rows=R, hidden=d, dtype=dtype, **how),
        {**results, "x": x.to(KINDS[dtype]), "w": w.to(KINDS[dtype]), "bias": bias},
        lambda t: _named(
            operators.ROUTE(
                (t["x"].double() @ t["w"].double().T).to(t["x"].dtype).cpu(),
                t["bias"].cpu(),
                *grouped,
            )
        ),
        2.0 * rows * e * d,
    )
    block = max(rows // 2, 1)
    bound: dict[str, Any] = {"capacity": 1.0, "pool": max(k, e // 2)}
    limits = (bound["capacity"], True, bound["pool"])
    begins = torch.arange(2, device=bias.device)
    yield Case(
        "route_limited",
        route_limited.launches(
            **{"rows": R, "blocks": {"B": 2}, "slots": 2, "block_length": block, "dtype": "f32"},
            **{**how, **bound, "overflow_reroutes": True},
        ),
        {
            **results,
            **{"logits": normal(rows, e, of=torch.float32), "bias": bias},
            **{"row_seq": whole(rows, below=2), "row_pos": whole(rows, below=rows)},
            **{"block_seq": begins, "block_pos": begins[:, None] + whole(1, block, below=rows)},
        },
        lambda t: _named(
            limited(
                *(t[n].cpu() for n in ("logits", "bias", "row_seq", "row_pos")),
                *(t[n].cpu() for n in ("block_seq", "block_pos")),
                *grouped,
                *limits,
            )
        ),
    )


def _named(found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"weights": found[0].double(), "experts": found[1]}


def _soft_embed(t: Tensors) -> dict[str, Tensor]:
    z = (t["x"].double() @ t["w"].double().T).to(t["x"].dtype).double()
    mixed = torch.softmax(z, -1) @ t["table"].double() * t["weight"].double()[:, None]
    return {"y": torch.where(t["live"][:, None], mixed, 0.0)}


def _advance(where: str) -> Case:
    """One sequence that is not done, and turns left: clocks go on, and so does the loop."""
    kinds = {
        **{"done": torch.bool, "iteration": torch.int64, "tick": torch.int64},
        **{"finished": torch.int32, "performed": torch.int64},
        **dict.fromkeys(("turn", "limit", "go", "wanted"), torch.int32),
    }
    start = {"iteration": 3, "tick": 7, "limit": 1 << 30}
    operands = {
        name: torch.full((1,), start.get(name, 0), dtype=kind, device=where)
        for name, kind in kinds.items()
    }
    after = {"iteration": 4, "tick": 8, "finished": 0, "performed": 1, "turn": 1, "go": 1}
    return Case(
        "advance",
        advance.launches(sequences=B, most=8),
        operands,
        lambda t: {n: torch.full_like(t[n], value) for n, value in after.items()},
    )
