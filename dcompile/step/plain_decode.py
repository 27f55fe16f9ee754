"""The plain reference: the whole sequence through the plain model every iteration, no cache, one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcompile.frontends.base import ModelSpec
from dcompile.policies import Policy, find_policy
from dcompile.step.choose import Blocks, write_tokens


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
    state: Mapping[str, Tensor] = fresh_state(chosen, n, "request")
    forwards = 0
    for begin in range(start, total, n):
        block = canvas[:, begin : begin + n]
        entered = (block == spec.mask_id).sum(-1)
        state = {**state, **fresh_state(chosen, n, "block")}
        turn, done = 0, False
        while not done:
            logits = model(canvas)
            if spec.shift:
                logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
            blocks = Blocks(
                current=block.clone(),
                position=torch.arange(begin, begin + n)[None],
                iteration=torch.full((1,), turn),
                entered=entered,
                temperature=torch.zeros(1),
                seed=torch.zeros(1, dtype=torch.int64),
                tick=torch.full((1,), forwards),
                prompt_end=torch.full((1,), len(prompt)),
            )
            found = logits[:, begin : begin + n]
            written = write_tokens(chosen, spec.mask_id, found, blocks, values, state)
            block[:] = written.updated
            state, done = written.state, bool(written.done)
            forwards, turn = forwards + 1, turn + 1
        made = canvas[0, len(prompt) : begin + n].tolist()
        ends = [i for i, t in enumerate(made) if t in spec.eos_ids]
        if early_stop and ends:
            canvas[0, len(prompt) + ends[0] :] = made[ends[0]]
            break
    return PlainResult(canvas[0, len(prompt) : len(prompt) + gen_length].tolist(), forwards)


def fresh_state(policy: Policy, n: int, reset: str) -> dict[str, Tensor]:
    """One sequence's memory of a policy, as it is when a request (or a block) begins."""
    return {
        name: torch.zeros(1, *item.shape(n), dtype=item.dtype)
        for name, item in policy.state.items()
        if item.reset == reset
    }
