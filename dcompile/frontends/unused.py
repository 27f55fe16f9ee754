"""Stored tensors that the model does not use, compared with what it uses in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from dcompile.errors import TensorError
from dcompile.frontends.base import Definition
from dcompile.frontends.files import Tensors

FREQUENCIES = "rotary_emb.inv_freq"
ROWS = 4096  # of a vocabulary table compared at a time


def replaced(definition: Definition, name: str) -> bool:
    """Whether the model has something else in the stored tensor's place."""
    return name.endswith(FREQUENCIES) or (definition.tied and name == _head(definition))


def refuse_what_differs(definition: Definition, dtype: torch.dtype, tensors: Tensors) -> None:
    """TensorError for a stored tensor that is not what the model uses in its place.

    Programs disagree which of two they use, so there is no right one to choose.
    """
    for name in tensors.headers:
        if name.endswith(FREQUENCIES):
            _check_frequencies(definition, name, tensors)
        elif replaced(definition, name):
            _check_head(definition, name, dtype, tensors)


def _check_head(definition: Definition, name: str, dtype: torch.dtype, tensors: Tensors) -> None:
    table = definition.rename("embed_tokens.weight")
    if not _same_rows(tensors.read(name), tensors.read(table), dtype):
        raise TensorError(
            f"{name!r} differs from {table!r}, which the config puts in its place",
            where=tensors.headers[name].file,
            remedy="correct the config ('tie_word_embeddings' or 'weight_tying' is false where "
            "both are used), or save the checkpoint without the one that is not",
        )


def _check_frequencies(definition: Definition, name: str, tensors: Tensors) -> None:
    with torch.device("meta"):
        sizes = definition.build((), torch.float32).sizes
    exponents = torch.arange(0, sizes.rotary_dim, 2, dtype=torch.float64) / sizes.rotary_dim
    if not _close(tensors.read(name), sizes.theta**-exponents):
        raise TensorError(
            f"{name!r} differs from the rotary frequencies of base {sizes.theta:g} that the "
            f"config gives to {sizes.rotary_dim} dimensions",
            where=tensors.headers[name].file,
            remedy="correct the config's rotary keys, or save the checkpoint without the tensor",
        )


def _same_rows(stored: Tensor, used: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tables [V, D] are equal as the model reads them, a part in memory at a time."""
    return stored.shape == used.shape and all(
        torch.equal(stored[at : at + ROWS].to(dtype), used[at : at + ROWS].to(dtype))
        for at in range(0, len(used), ROWS)
    )


def _close(stored: Tensor, expected: Tensor) -> bool:
    """Whether values [n] are those expected (float64), but for the rounding to what they are."""
    if stored.shape != expected.shape or not stored.is_floating_point():
        return False
    rounding = 1e-5 + torch.finfo(stored.dtype).eps
    return torch.allclose(stored.double(), expected, rtol=rounding, atol=1e-7)


def _head(definition: Definition) -> str:
    return definition.rename("lm_head.weight")
