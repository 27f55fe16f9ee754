"""A model of one layer whose parts can be replaced, and its step after the passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcompile.driver.pipeline import run
from dcompile.ir.program import Program, StepShape
from dcompile.ir.weights import Source
from dcompile.options import Options
from dcompile.policies import find_policy
from dcompile.step.trace import Traced, trace

POSITIONS, BLOCK = 40, 4


class Model(nn.Module):
    """One layer with rotary attention and a mixture of experts, and its parts replaceable."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.norm = nn.RMSNorm(16, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts_gate = nn.Parameter(torch.randn(4, 8, 16))
        self.experts_up = nn.Parameter(torch.randn(4, 8, 16))
        self.experts_down = nn.Parameter(torch.randn(4, 16, 8))
        self.head = nn.Linear(16, 61)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def weigh(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        weights, chosen = scores.topk(2, -1)
        return torch.zeros_like(scores).scatter(-1, chosen, weights)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, ids: Tensor) -> Tensor:
        angles = torch.arange(ids.shape[1])[:, None] / 7.0 * torch.ones(8)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x = self.embed(ids)
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (2, 8)) for p in (self.q, self.k, self.v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.o(a.transpose(1, 2).flatten(2))
        gate = torch.einsum("btd,efd->btef", x, self.experts_gate)
        up = torch.einsum("btd,efd->btef", x, self.experts_up)
        y = torch.einsum("btef,edf,bte->btd", F.silu(gate) * up, self.experts_down, self.weigh(x))
        return self.logits(x + y)


def planned(model: nn.Module, **options: object) -> Program:
    shape = StepShape(2, POSITIONS, BLOCK, 60, torch.float32)
    recipes = {name: Source(name) for name, _ in model.named_parameters()}
    program = trace(model.eval(), Traced(shape, find_policy("threshold"), recipes))
    run(program, Options(**options))  # type: ignore[arg-type]
    return program


def count(program: Program, *targets: object) -> int:
    return len(list(program.calls(*targets)))


def left_alone(program: Program, name: str) -> bool:
    return any(r.pass_name == name for r in program.remarks)
