"""The plain reference: the whole sequence through the plain model every iteration, no cache, one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dcompile.frontends.base import ModelSpec
from dcompile.ir import ops
from dcompile.policies import Choice, find_policy


@dataclass(frozen=True)
class PlainResult:
    tokens: list[int]  # every generated position
    forwards: int


@torch.no_grad()
def plain_decode(
    model: nn.Module,
    spec: ModelSpec,
    prompt: list[int],
    gen_length: int,
    block_length: int,
    policy: str = "threshold",
    early_stop: bool = True,
    **parameters: float,
) -> PlainResult:
    """Blockwise decoding as the papers write it; `policy` is run eagerly."""
    chosen = find_policy(policy)
    knobs = {**chosen.parameters, **parameters}
    values = {name: torch.full((1,), float(value)) for name, value in knobs.items()}
    n, aligned = spec.block_length or block_length, spec.block_length is not None
    start = len(prompt) // n * n if aligned else len(prompt)
    total = len(prompt) + gen_length
    total = -(-total // n) * n if aligned else total
    canvas = torch.full((1, total), spec.mask_id)
    canvas[0, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    forwards = 0
    for begin in range(start, total, n):
        block = canvas[:, begin : begin + n]
        entered = (block == spec.mask_id).sum(-1)
        turn = 0
        while bool((candidate := block == spec.mask_id).any()):
            logits = model(canvas)
            if spec.shift:
                logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
            zero = torch.zeros(1, dtype=torch.int64)
            pos = torch.arange(begin, begin + n)[None]
            token, confidence, margin, entropy = ops.choose(
                logits[:, begin : begin + n],
                candidate,
                torch.zeros(1),
                zero,
                zero,
                pos,
                spec.mask_id,
            )
            at = torch.full((1,), turn)
            choice = Choice(token, confidence, margin, entropy, candidate, at, entered)
            commit = chosen.commit(choice, values) & candidate
            if not bool(commit.any()):
                commit = candidate & (confidence >= confidence.amax(-1, keepdim=True))
            block[commit] = token[commit]
            forwards += 1
            turn += 1
        made = canvas[0, len(prompt) : begin + n].tolist()
        ends = [i for i, t in enumerate(made) if t in spec.eos_ids]
        if early_stop and ends:
            canvas[0, len(prompt) + ends[0] :] = made[ends[0]]
            break
    return PlainResult(canvas[0, len(prompt) : len(prompt) + gen_length].tolist(), forwards)
