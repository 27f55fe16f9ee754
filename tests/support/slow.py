"""Decoding written a second time, one row, no cache, as plain as it can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def decode(
    model: nn.Module,
    prompt: list[int],
    gen_length: int,
    block: int,
    mask_id: int,
    *,
    threshold: float | None = None,
    steps: int | None = None,
    aligned: bool = False,
    shift: bool = False,
) -> tuple[list[int], int]:
    """(generated tokens, forwards) of one prompt by `threshold` or by `steps`, every forward full.

    `aligned`: blocks start at multiples of the block length (block-causal models).
    """
    start = len(prompt) // block * block if aligned else len(prompt)
    total = len(prompt) + gen_length
    if aligned:
        total = -(-total // block) * block
    x = torch.tensor(prompt + [mask_id] * (total - len(prompt)))
    forwards = 0
    for begin in range(start, total, block):
        part = x[begin : begin + block]
        entered = int((part == mask_id).sum())
        turn = 0
        while bool((part == mask_id).any()):
            forwards += 1
            token, confidence = _choose(model, x, mask_id, shift)
            candidate = part == mask_id
            score = torch.where(candidate, confidence[begin : begin + block], -1.0)
            if steps is not None:
                count = entered // steps + (turn < entered % steps)
                best = sorted(range(len(part)), key=lambda i: (-float(score[i]), i))
                chosen = [i for i in best[: max(count, 1)] if bool(candidate[i])]
            else:
                assert threshold is not None
                chosen = [i for i in range(len(part)) if float(score[i]) >= threshold]
                chosen = chosen or [int(score.argmax())]
            for i in chosen:
                part[i] = token[begin + i]
            turn += 1
    return x[len(prompt) : len(prompt) + gen_length].tolist(), forwards


def _choose(model: nn.Module, x: Tensor, mask_id: int, shift: bool) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = model(x[None])
    logits = (logits if isinstance(logits, Tensor) else logits.logits)[0].float()
    if shift:
        logits = torch.cat((logits[:1], logits[:-1]))
    p = torch.softmax(logits, -1)
    without = p.clone()
    without[:, mask_id] = -1
    confidence, token = without.max(-1)
    return token, confidence
