"""Arrays as torch's tensors over the same memory, and back; whoever needs that has torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch

from dcompile.runtime.weights import DTYPES, Array

TORCH: Mapping[str, torch.dtype] = {name: getattr(torch, t.name) for name, t in DTYPES.items()}
"""torch's types by the plan's names."""
_FOREIGN = {TORCH[name]: dtype for name, dtype in DTYPES.items() if dtype.isbuiltin != 1}
"""Types that are not numpy's own: they go over as whole numbers of their size."""
_WHOLE = {1: torch.uint8, 2: torch.int16}


def array_of(tensor: torch.Tensor) -> Array:
    """A tensor of the host as an array."""
    foreign = _FOREIGN.get(tensor.dtype)
    if foreign is None:
        return tensor.detach().numpy()
    return tensor.detach().view(_WHOLE[foreign.itemsize]).numpy().view(foreign)


def tensor_of(array: Array) -> torch.Tensor:
    """An array as a tensor; where the array must not be written to, nor must the tensor."""
    torch_dtype = getattr(torch, array.dtype.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if torch_dtype not in _FOREIGN:
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(f"i{array.itemsize}")).view(torch_dtype)


def arrays_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, Array]]:
    """Named tensors as arrays, one held at a time."""
    for name, tensor in tensors:
        yield name, array_of(tensor)
        del tensor
