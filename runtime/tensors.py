"""Arrays as torch's tensors over the same memory, and back; whoever needs that has torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch

from dcompile.runtime.weights import DTYPES, LONG, Array

TORCH: Mapping[str, torch.dtype] = {short: getattr(torch, long) for short, long in LONG.items()}
"""torch's types by the plan's names."""
_FOREIGN = {torch.bfloat16: "bf16"}
"""Types that are not numpy's own: they go over as whole numbers of their size."""
_WHOLE = {1: torch.int8, 2: torch.int16}


def array_of(tensor: torch.Tensor) -> Array:
    """A tensor of the host as an array."""
    foreign = _FOREIGN.get(tensor.dtype)
    if foreign is None:
        return tensor.detach().numpy()
    return tensor.detach().view(_WHOLE[tensor.itemsize]).numpy().view(DTYPES[foreign])


def tensor_of(array: Array) -> torch.Tensor:
    """An array as a tensor; where the array must not be written to, nor must the tensor."""
    dtype = getattr(torch, array.dtype.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if dtype not in _FOREIGN:
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(f"i{array.itemsize}")).view(dtype)


def arrays_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, Array]]:
    """Named tensors as arrays, one held at a time."""
    for name, tensor in tensors:
        yield name, array_of(tensor)
        del tensor
