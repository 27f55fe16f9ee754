"""The honest rivals on a GPU: the same rows and cache in eager PyTorch, and torch.compile of that.

Attention is scaled-dot-product attention over the valid keys, experts one grouped product each, the
vocabulary is projected for the block's rows only; nothing waits for the host, so all of it compiles.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcompile.bench.eager import BODIES, BY_HAND
from dcompile.driver.origin import trace_origin
from dcompile.driver.pipeline import run
from dcompile.ir import operators
from dcompile.ir.edit import value
from dcompile.runtime.tensors import tensor_of
from gpu import models
from gpu.machine import Machine, spread
from gpu.models import Model


class Rival:
    """One model's step by hand, for a batch, a window and a context."""

    def __init__(self, model: Model, batch: int, window: int, context: int) -> None:
        self.where = model.where
        program = trace_origin(model.origin, model.settled, lambda _: None)
        run(program, replace(model.settled.options, skip=BY_HAND, stop_after=None))
        weights = [(i.name, i.name, "plain") for i in program.inputs if i.kind == "weight"]
        known = models.draw(program, weights, self.where, model.experts)
        known |= {name: tensor.to(self.where) for name, tensor in program.constants.items()}
        for item in program.inputs:
            if item.kind == "state":
                like = value(program.placeholder(item.name))
                shape = [int(d) for d in like.shape]
                known[item.name] = torch.zeros(shape, dtype=like.dtype, device=self.where)
        self.canvas = known["canvas"]
        given = models.inputs(model, batch, window, context)
        extra = {i.name for i in program.inputs if i.kind == "step"} - set(given)
        assert not extra, extra
        known |= {name: tensor_of(array).to(self.where) for name, array in given.items()}
        bodies = {
            **BODIES,
            operators.ATTEND: _attend(batch, window, context),
            operators.MOE_FFN: _moe_ffn,
        }
        for node in program.graph.nodes:
            node.target = bodies.get(node.target, node.target)
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device(self.where)}
        self.module = torch.fx.GraphModule({}, program.graph)
        self.arguments = [known[i.name] for i in program.inputs]
        models.canvas(model, batch, context)
        self.tokens = torch.tensor(model.executor.state["canvas"], device=self.where)

    def measure(self, machine: Machine, compiled: bool) -> dict[str, Any]:
        """Median and quartiles, the canvas new each time; torch has the GPU's clock."""
        call: Any = self.module
        began = time.perf_counter()
        if compiled:
            how: dict[str, Any] = {"backend": "eager"} if machine.dry else {"mode": "max-autotune"}
            call = torch.compile(self.module, dynamic=False, **how)
        times = []
        with torch.no_grad():
            for turn in range(machine.rounds + 3):
                self.canvas.copy_(self.tokens)
                took = self._time(call)
                if turn == 0:
                    first = time.perf_counter() - began
                if turn >= 3:
                    times.append(took * 1e3)
        return {**spread(times), "first_seconds": first}

    def _time(self, call: Any) -> float:
        if self.where != "cuda":
            began = time.perf_counter()
            call(*self.arguments)
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(*self.arguments)
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def _attend(batch: int, window: int, context: int) -> Any:
    def attend(
        q: Tensor, keys: Tensor, values: Tensor, row_seq: Tensor, row_limit: Tensor, scale: float
    ) -> Tensor:
        # The plan may ask for the block's rows only, in its last layer.
        rows = q.shape[0] // batch
        grouped = q.view(batch, rows, *q.shape[1:]).transpose(1, 2)
        k, v = (c[:batch, :context].transpose(1, 2) for c in (keys, values))
        same = q.shape[1] == keys.shape[2]
        out = F.scaled_dot_product_attention(grouped, k, v, scale=scale, enable_gqa=not same)
        return out.transpose(1, 2).reshape(q.shape)

    return attend


def _moe_ffn(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Rows sorted by expert, one grouped product after the other; off the GPU each expert by itself."""
    k = experts.shape[1]
    order = experts.flatten().argsort()
    sorted_rows = x[order // k]
    count = gate_up.shape[0]
    ends = (experts.flatten()[:, None] == torch.arange(count, device=x.device)).sum(0).cumsum(0)
    gate, up = _grouped(sorted_rows, gate_up, ends).chunk(2, -1)
    y = _grouped(F.silu(gate) * up, down, ends) * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, order // k, y)


def _grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    if x.is_cuda:
        return torch._grouped_mm(x, w.transpose(1, 2), offs=ends.to(torch.int32))
    owner = torch.searchsorted(ends, torch.arange(len(x)), right=True)
    return torch.einsum("rk,rnk->rn", x, w[owner])
