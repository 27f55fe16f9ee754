"""The honest rival: the same step, rows and cache in eager PyTorch, as one would write it by hand.

Scaled-dot-product attention over the valid keys, keys and values written in place, experts looped over
only where they have tokens, the vocabulary projected for the block's rows only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dcompile.driver.origin import open_origin, trace_origin
from dcompile.driver.pipeline import run
from dcompile.driver.settle import settle
from dcompile.ir import operators
from dcompile.ir.edit import value
from dcompile.ir.operators.route import scores, shares
from dcompile.ir.program import Program
from dcompile.ir.weights import Read
from dcompile.options import Options

aten = torch.ops.aten
BY_HAND = (
    "merge_projections",
    "fuse_silu_mul",
    "fuse_norm_rope_write",
    "fuse_add_rms_norm",
    "fuse_vocab_choice",
)


def eager_step(checkpoint: Path, options: Options) -> EagerStep:
    """The eager step of a checkpoint, with the block length, slots and maximum length of `options`."""
    origin = open_origin(checkpoint, options)
    settled = settle(options, origin.spec)
    program = trace_origin(origin, settled, lambda _: None)
    run(program, replace(settled.options, skip=BY_HAND, stop_after=None))
    return EagerStep(program, origin.read)


class EagerStep:
    """Call it like an executor: `step(inputs)` changes `state` in place and returns the outputs."""

    def __init__(self, program: Program, read: Read) -> None:
        self.names = [i.name for i in program.inputs]
        self.outputs = [o.name for o in program.outputs]
        self.fixed: dict[str, Tensor] = dict(program.constants)
        self.state: dict[str, Tensor] = {}
        for item in program.inputs:
            like = value(program.placeholder(item.name))
            if item.kind == "weight":
                made = program.recipes[item.name].read(read)
                self.fixed[item.name] = made.to(like.dtype).contiguous()
            elif item.kind == "state":
                size = [int(d) for d in like.shape]
                self.state[item.name] = torch.zeros(size, dtype=like.dtype)
        for node in program.graph.nodes:
            if node.target in BODIES:
                node.target = BODIES[node.target]
        self.module = torch.fx.GraphModule({}, program.graph)
        self.call = self.module.forward

    def compiled(self) -> EagerStep:
        """The same through torch.compile."""
        self.call = torch.compile(self.module, dynamic=False)
        return self

    def step(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        known = {**self.fixed, **self.state, **inputs}
        with torch.no_grad():
            out = self.call(*(known[name] for name in self.names))
        return dict(zip(self.outputs, out, strict=True))


def _write(cache: Tensor, rows: Tensor, row_seq: Tensor, row_pos: Tensor) -> Tensor:
    return cache.index_put_((row_seq, row_pos), rows)


def _put(canvas: Tensor, indices: list[Tensor], values: Tensor) -> Tensor:
    return canvas.index_put_(indices, values)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, row_seq: Tensor, row_limit: Tensor, scale: float
) -> Tensor:
    if bool((row_seq == row_seq[0]).all()) and bool((row_limit == row_limit[0]).all()):
        return _one(q, keys, values, int(row_seq[0]), int(row_limit[0]), scale)
    out = torch.empty_like(q)
    pairs = torch.stack((row_seq, row_limit), 1)
    for slot, limit in pairs.unique(dim=0).tolist():
        rows = (pairs == torch.tensor([slot, limit])).all(1).nonzero()[:, 0]
        out[rows] = _one(q[rows], keys, values, slot, limit, scale)
    return out


def _one(q: Tensor, keys: Tensor, values: Tensor, slot: int, limit: int, scale: float) -> Tensor:
    k, v = (c[slot, :limit].transpose(0, 1)[None] for c in (keys, values))
    same = q.shape[1] == keys.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, scale=scale, enable_gqa=not same
    )
    return out[0].transpose(0, 1)


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
    out = torch.zeros_like(x)
    for e in experts.unique().tolist():
        if e < 0:
            continue
        row, rank = torch.where(experts == e)
        gate, up = F.linear(x[row], gate_up[e]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down[e])
        out.index_add_(0, row, y * weights[row, rank, None].to(y.dtype))
    return out


def _route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    kept_groups: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    s, by = scores(logits, bias, score, groups, kept_groups)
    chosen = by.topk(top_k, -1).indices
    share = shares(logits, s, chosen, score, renormalize, scale)
    return share.gather(-1, chosen), chosen.to(torch.int32)


def _choose(
    logits: Tensor,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy: the maximum but for the mask id, and its probability."""
    z = logits.float()
    total = z.logsumexp(-1)
    z[..., mask_id] = float("-inf")
    best, token = z.max(-1)
    confidence = torch.where(live, (best - total).exp(), float("-inf"))
    return token, confidence, confidence, confidence


BODIES = {
    operators.WRITE_ROWS: _write,
    operators.ATTEND: _attend,
    operators.MOE_FFN: _moe_ffn,
    operators.ROUTE: _route,
    operators.CHOOSE: _choose,
    aten.index_put.default: _put,
}
_LEFT_OUT = "made by a pass that the rival does without"
# The operators that the rival never has, or runs as their references.
AS_THEY_STAND: Mapping[object, str] = {
    operators.ADD_RMS_NORM: _LEFT_OUT,
    operators.SILU_MUL: _LEFT_OUT,
    operators.NORM_ROPE_WRITE: _LEFT_OUT,
    operators.VOCAB_CHOICE: _LEFT_OUT,
    operators.VOCAB_CHOICE_ASKED: _LEFT_OUT,
    operators.CHOOSE_ASKED: "a reference; what is asked of tokens is small beside the step",
    operators.ROUTE_LIMITED: "a reference; no rival limits its experts",
    operators.SOFT_EMBED: "a reference; no rival smooths its iterations",
    operators.VOCAB_SOFT_EMBED: "a reference; no rival smooths its iterations",
}
