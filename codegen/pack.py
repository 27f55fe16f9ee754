"""Weights in the order in which the kernels read them: panels of 32 output columns, K-major.

A weight [N, K] becomes ceil(N / 32) panels, the last one padded with zeros:

    f32, f16   [K][32]              element (k, column)
    bf16       [ceil(K / 2)][32][2] pairs along K side by side, an odd K padded with a zero

The order is the same for every instruction set.  `gate_up` of a mixture of experts is an expert's
gate rows, then its up rows, packed as one weight of 2F rows.
"""

from __future__ import annotations

import torch

PANEL = 32


def packed_size(n: int, k: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the number of elements of a packed weight [n, k]."""
    return -(-n // PANEL) * PANEL * _padded(k, dtype)


def pack_linear(w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return w [N, K] packed, 1-D, of the same dtype; into `out` where one is given."""
    n, k = w.shape
    if out is None:
        out = torch.empty(packed_size(n, k, w.dtype), dtype=w.dtype)
    if n == 0 or k == 0:
        return out
    whole = n // PANEL
    panels = _panels(out, n, k)
    _fill(panels[:whole], w[: whole * PANEL])
    if n % PANEL:
        last = w.new_zeros(PANEL, k)
        last[: n % PANEL] = w[whole * PANEL :]
        _fill(panels[whole:], last)
    return out


def pack_experts(w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return w [E, N, K] packed expert by expert: `pack_linear` of each, one after the other."""
    experts, n, k = w.shape
    size = packed_size(n, k, w.dtype)
    if out is None:
        out = torch.empty(experts * size, dtype=w.dtype)
    for e in range(experts):
        pack_linear(w[e], out[e * size : (e + 1) * size])
    return out


def unpack_linear(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return the weight [n, k] that `pack_linear` packed."""
    panels = _panels(packed, n, k)
    return panels.permute(0, 2, 1, 3).reshape(panels.shape[0] * PANEL, -1)[:n, :k].contiguous()


def _padded(k: int, dtype: torch.dtype) -> int:
    return k + k % _pair(dtype)


def _pair(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


def _panels(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """View a packed weight as [panel, k / pair, column, pair]."""
    pair = _pair(packed.dtype)
    return packed.view(-(-n // PANEL), _padded(k, packed.dtype) // pair, PANEL, pair)


def _fill(panels: torch.Tensor, w: torch.Tensor) -> None:
    """Write w [panels * 32, K] into the panels."""
    count, k_pairs, _, pair = panels.shape
    k = w.shape[1]
    if k % pair:
        w = torch.nn.functional.pad(w, (0, 1))
    if pair == 2:
        # A pair moves as one 32-bit word, which torch transposes quickly.
        words = w.contiguous().view(torch.int32).view(count, PANEL, k_pairs)
        panels.view(torch.int32).squeeze(3).copy_(words.transpose(1, 2))
    else:
        panels.squeeze(3).copy_(w.reshape(count, PANEL, k).transpose(1, 2))
