"""What each family computes, in float64, from the formulas; on whatever torch device the operands are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.tuning.problems import Problem

Tensors = Mapping[str, Tensor]


def reference(problem: Problem, operands: Tensors) -> dict[str, Tensor]:
    """The results that are compared, by the operands' names."""
    return _BY_FAMILY[problem.shape.family](problem.sizes, operands)


def _linear(s: Mapping[str, int], t: Tensors) -> dict[str, Tensor]:
    return {"y": t["x"].double() @ t["w"].double().T}


def _gated(s: Mapping[str, int], t: Tensors) -> dict[str, Tensor]:
    gate, up = (t["x"].double() @ t["w"].double().T).chunk(2, -1)
    return {"y": gate * torch.sigmoid(gate) * up}


def _experts(s: Mapping[str, int], t: Tensors) -> dict[str, Tensor]:
    x, out = t["x"].double(), torch.zeros_like(t["x"], dtype=torch.float64)
    routed = s["e"] - s["shared"]

    def one(e: int, rows: Tensor) -> Tensor:
        gate, up = (rows @ t["gate_up"][e].double().T).chunk(2, -1)
        return (gate * torch.sigmoid(gate) * up) @ t["down"][e].double().T

    for e in range(routed):
        row, rank = torch.where(t["experts"] == e)
        if len(row):
            weight = t["weights"][row, rank].double()[:, None]
            out.index_add_(0, row, one(e, x[row]) * weight)
    for e in range(routed, s["e"]):
        out += one(e, x)
    return {"y": out}


def _attend(s: Mapping[str, int], t: Tensors) -> dict[str, Tensor]:
    keys, values = (
        t[n][0].double().repeat_interleave(s["h"] // s["g"], 1) for n in ("keys", "values")
    )
    scores = torch.einsum("rhd,lhd->rhl", t["q"].double(), keys) * s["d"] ** -0.5
    return {"o": torch.einsum("rhl,lhd->rhd", torch.softmax(scores, -1), values)}


def _choice(s: Mapping[str, int], t: Tensors) -> dict[str, Tensor]:
    """Logits are rounded to the weights' dtype, as stored ones would be; the last id is the mask."""
    z = (t["x"].double() @ t["w"].double().T).to(t["w"].dtype).double()
    p = torch.softmax(z, -1)
    best = p[..., :-1].topk(2, -1)
    logs = torch.log_softmax(z, -1)
    return {
        "token": best.indices[..., 0],
        "confidence": best.values[..., 0],
        "margin": best.values[..., 0] - best.values[..., 1],
        "entropy": -(p * logs).sum(-1),
    }


_BY_FAMILY = {
    "linear": _linear,
    "gated": _gated,
    "gate_up": _experts,
    "down": _experts,
    "attend": _attend,
    "vocab_choice": _choice,
}
