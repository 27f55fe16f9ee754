"""Calls of single CPU kernels from torch tensors: packed weights, guarded outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from guards import TYPES, Out, guarded, rand
from native import Library, Value

from dcompile.codegen import pack


def run_linear(
    lib: Library, t: str, x: torch.Tensor, w: torch.Tensor, bias: Value, residual: Value
) -> torch.Tensor:
    y = Out(x.shape[0], w.shape[0], dtype=TYPES[t])
    packed = guarded(pack.pack_linear(w))
    lib.call(f"linear_{t}", y.tensor, x, packed, bias, residual, len(x), *w.shape)
    return y.check()


def run_attend(
    lib: Library,
    t: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq: torch.Tensor,
    limit: torch.Tensor,
) -> torch.Tensor:
    (R, H, D), (_, L, G, _) = q.shape, k.shape
    o = Out(R, H, D, dtype=TYPES[t])
    lib.call(f"attend_{t}", o.tensor, q, k, v, seq, limit, R, H, G, D, L, D**-0.5)
    return o.check()


ACTIVATIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    F.silu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
]


class Experts:
    def __init__(self, E: int, D: int, width: int, t: str, biased: bool = True) -> None:
        self.t, self.D, self.width, self.E = t, D, width, E
        self.gate_up = rand(E, 2 * width, D, t=t, scale=D**-0.5)
        self.down = rand(E, D, width, t=t, scale=width**-0.5)
        self.biases = (rand(E, 2 * width, t=t), rand(E, D, t=t)) if biased else (None, None)
        self.packed = (
            guarded(pack.pack_experts(self.gate_up)),
            guarded(pack.pack_experts(self.down)),
        )

    def run(
        self,
        lib: Library,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        act: int = 0,
    ) -> torch.Tensor:
        y = Out(*x.shape, dtype=TYPES[self.t])
        sizes = (len(x), self.D, self.width, self.E, experts.shape[1], act)
        lib.call(
            f"moe_ffn_{self.t}", y.tensor, x, weights, experts, *self.packed, *self.biases, *sizes
        )
        return y.check()

    def reference(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, act: int = 0
    ) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=torch.double)
        for e in range(self.E):
            rows, rank = (experts == e).nonzero(as_tuple=True)
            h = x[rows].double() @ self.gate_up[e].double().T
            h = h if self.biases[0] is None else h + self.biases[0][e].double()
            gate, up = h.chunk(2, -1)
            v = (ACTIVATIONS[act](gate) * up) @ self.down[e].double().T
            v = v if self.biases[1] is None else v + self.biases[1][e].double()
            out.index_add_(0, rows, v * weights[rows, rank, None].double())
        return out


def choose(R: int, E: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    experts = torch.stack([torch.randperm(E)[:k] for _ in range(R)]).int()
    return torch.rand(R, k), experts


class Choices:
    def __init__(self, C: int) -> None:
        self.outs = (Out(C, dtype=torch.int64), *(Out(C, dtype=torch.float32) for _ in range(3)))

    @classmethod
    def run(
        cls,
        lib: Library,
        t: str,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: Value,
        mask_id: int,
        live: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        C, B = len(x), 1 if temperature is None else len(temperature)
        self = cls(C)
        seed, tick = torch.arange(B) * 77777777777 + 5, torch.arange(B) + 3
        lib.call(
            f"vocab_choice_{t}",
            *(out.tensor for out in self.outs),
            *(x, guarded(pack.pack_linear(w)), bias),
            torch.ones(C, dtype=torch.uint8) if live is None else live,
            torch.zeros(B) if temperature is None else temperature,
            *(seed, tick, torch.arange(C) + 100, C, B, *w.shape, mask_id),
        )
        return [out.check() for out in self.outs]
