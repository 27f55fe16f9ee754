"""What a model picks by its data, as all values and the mask of those that count; see expert_loops.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dcompile.errors import DataDependentShape

F = torch.nn.functional
# Each place's value depends on that place only; what else they take has no places.
POINTWISE = {
    *(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.add),
    *(torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.to),
    *(torch.Tensor.float, torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.contiguous),
    *(torch.Tensor.clone, torch.Tensor.clamp, torch.clamp, torch.sigmoid, torch.Tensor.sigmoid),
    *(F.silu, F.gelu, F.relu, torch.relu, torch.nn.functional.dropout, F.linear, torch.tanh),
    *(torch.Tensor.matmul, torch.matmul, torch.Tensor.__matmul__, torch.Tensor.__truediv__),
}
SPLITS = {torch.chunk, torch.Tensor.chunk, torch.split, torch.Tensor.split}


@dataclass(frozen=True, eq=False)
class Mask:
    """Places picked: a boolean tensor; of experts hit, the loop that runs over them."""

    where: Tensor
    loop: Callable[[int], Iterator[Hit]] | None = None  # of how many axes its experts are


class Count:
    """How many places were picked: known only to be asked whether there are any."""

    def _any(self, other: object) -> bool:
        if other == 0:
            return True  # with none, the masks add nothing
        raise unknown("the number of chosen tokens")

    __gt__ = __ne__ = _any

    def __eq__(self, other: object) -> bool:
        return not self._any(other)

    def __bool__(self) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Hit:
    """An expert of the loop, as a tensor of one number would say it: of shape [1], or of no axes."""

    number: int
    axes: int

    @property
    def key(self) -> int | slice:
        """What indexes as the tensor would."""
        return slice(self.number, self.number + 1) if self.axes else self.number

    def __index__(self) -> int:
        return self.number

    def __getitem__(self, key: object) -> int:
        if not self.axes:
            raise IndexError("an expert's number has no axes")
        return self.number

    def __eq__(self, other: object) -> bool:
        return self.number == other

    def tolist(self) -> int | list[int]:
        return [self.number] if self.axes else self.number

    __int__ = item = __index__
    __hash__ = None  # type: ignore[assignment]

    def squeeze(self, *dims: int) -> Hit:
        return Hit(self.number, 0)


@dataclass(frozen=True, eq=False)
class Picked:
    """`full` [*places, ..] at the picked places, as a tensor [n, ..] with n unknown.

    `axis` is set where the values are the places' own indices along one of the mask's axes; `column`
    where they are [n, 1].
    """

    mask: Mask
    full: Tensor | None
    axis: int | None = None
    column: bool = False

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return apply(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("__") or method is None:
            raise AttributeError(name)
        if name == "shape":
            raise unknown("the shape of chosen tokens")
        if name in ("dtype", "device"):
            return getattr(self.full, name) if self.full is not None else torch.int64
        return lambda *args, **kwargs: apply(method, (self, *args), kwargs)

    def __getitem__(self, key: Any) -> Any:
        return apply(torch.Tensor.__getitem__, (self, key), {})

    def __mul__(self, other: Any) -> Any:
        return apply(torch.Tensor.__mul__, (self, other), {})

    def __rmul__(self, other: Any) -> Any:
        return apply(torch.Tensor.__mul__, (self, other), {})

    def __radd__(self, other: Any) -> Any:
        return apply(torch.Tensor.__add__, (self, other), {})

    def __add__(self, other: Any) -> Any:
        return apply(torch.Tensor.__add__, (self, other), {})

    def __matmul__(self, other: Any) -> Any:
        return apply(torch.Tensor.__matmul__, (self, other), {})

    def __truediv__(self, other: Any) -> Any:
        return apply(torch.Tensor.__truediv__, (self, other), {})

    def __len__(self) -> int:
        raise unknown("the number of chosen tokens")

    def __iter__(self) -> Iterator[Hit]:
        if self.axis is None or self.mask.where.dim() != 1:
            raise unknown("which tokens are chosen")
        if self.mask.loop is None:
            raise unknown("which experts are looped over")
        return self.mask.loop(int(self.column))


def unknown(what: str) -> DataDependentShape:
    return DataDependentShape(
        f"the model's graph depends on its data: {what}",
        remedy="select with masks (torch.where) instead of data-dependent shapes or branches",
    )


def apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator on picked values: on all places."""
    name = getattr(func, "__name__", str(func))
    first = args[0]
    if name in ("index_add_", "index_add"):
        return _add_back(func, *args, **kwargs)
    if name in ("numel", "size", "__len__") and isinstance(first, Picked):
        if name == "size" and args[1:] not in ((0,), ()):
            return first.full.shape[args[1]] if args[1] < 0 else refuse(name)  # type: ignore
        return Count()
    if name in ("squeeze", "flatten", "view", "reshape", "unsqueeze") and first.axis is not None:
        return _turn(name, first, args[1:])
    if name in ("reshape", "view"):
        return _reshape(*args, **kwargs)
    if name == "__getitem__":
        return _part(*args)
    known = func in SPLITS or func in POINTWISE or name in {f.__name__ for f in POINTWISE}
    if not known or (func in SPLITS and kwargs.get("dim", args[-1]) != -1):
        return refuse(name)
    picked = [a for a in args if isinstance(a, Picked)]
    mask = picked[0].mask
    if any(p.mask is not mask or p.axis is not None for p in picked):
        return refuse(name)
    others = [a for a in args if isinstance(a, Tensor) and func not in (F.linear,)]
    if any(t.dim() > 1 and name not in ("matmul", "__matmul__") for t in others):
        return refuse(name)
    plain = [a.full if isinstance(a, Picked) else a for a in args]
    out = func(*plain, **kwargs)
    if isinstance(out, (tuple, list)):
        return tuple(Picked(mask, t) for t in out)
    return Picked(mask, out)


def _turn(name: str, x: Picked, dims: tuple[Any, ...]) -> Picked:
    """Indices [n, 1] as [n], and back."""
    if name in ("view", "reshape"):
        shape = tuple(dims[0]) if isinstance(dims[0], (tuple, list)) else dims
        if shape not in ((-1,), (-1, 1)):
            return refuse(name)  # type: ignore[no-any-return]
        return replace(x, column=len(shape) == 2)
    if name == "unsqueeze" and (x.column or dims not in ((-1,), (1,))):
        return refuse(name)  # type: ignore[no-any-return]
    return replace(x, column=name == "unsqueeze")


def refuse(name: str) -> Any:
    raise unknown(f"{name} of tokens chosen by their data")


def _reshape(x: Picked, *shape: Any) -> Picked:
    """[n, D] -> [-1, D], which changes nothing."""
    sizes = shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape
    assert x.full is not None
    if len(sizes) == 2 and sizes[0] == -1 and sizes[1] == x.full.shape[-1]:
        return x
    return refuse("reshape")  # type: ignore[no-any-return]


def _part(x: Picked, key: Any) -> Any:
    """Features of picked values: x[..., a:b], x[:, a:b], x[:, None]"""
    keys = key if isinstance(key, tuple) else (key,)
    if x.full is None or any(isinstance(k, (Tensor, Picked)) for k in keys):
        return refuse("a lookup")
    if keys[0] == slice(None):
        keys = (slice(None),) * x.mask.where.dim() + keys[1:]
    elif keys[0] is not Ellipsis:
        return refuse("a lookup")
    return Picked(x.mask, x.full[keys])


def look_up(x: Tensor, keys: tuple[Any, ...]) -> Picked:
    """x[rows], x[rows, slots], x[None, rows], x[rows, slots, None]: the values at all places."""
    picked = [k for k in keys if isinstance(k, Picked)]
    mask = picked[0].mask
    if any(p.mask is not mask or p.axis is None or p.column for p in picked):
        return refuse("a lookup")  # type: ignore[no-any-return]
    # x[None, rows] has an axis of size 1 in front that the reshape after it removes.
    while keys[0] is None:
        keys = keys[1:]
    rank = mask.where.dim()
    axes = [k.axis for k in keys if isinstance(k, Picked)]
    tail = keys[len(axes) :]
    if any(isinstance(k, Picked) for k in tail) or len(set(axes)) < len(axes):
        return refuse("a lookup")  # type: ignore[no-any-return]
    order = sorted(range(len(axes)), key=lambda i: axes[i] or 0)
    values = x.permute(*order, *range(len(axes), x.dim()))
    for axis in range(rank):
        if axis not in axes:
            values = values.unsqueeze(axis)
    if tail:
        values = values[(slice(None),) * rank + tail]
    return Picked(mask, values)


def _add_back(func: Any, out: Tensor, dim: int, rows: Any, values: Any, **kwargs: Any) -> Tensor:
    """out[rows] += values, of all places where the mask is set"""
    if not (isinstance(rows, Picked) and isinstance(values, Picked)) or kwargs or dim != 0:
        return refuse("index_add")  # type: ignore[no-any-return]
    mask, axis = rows.mask, rows.axis
    if values.mask is not mask or axis is None or rows.column or values.full is None:
        return refuse("index_add")  # type: ignore[no-any-return]
    when = mask.where.reshape(*mask.where.shape, *[1] * (values.full.dim() - mask.where.dim()))
    kept = values.full * when.to(values.full.dtype)
    others = [a for a in range(mask.where.dim()) if a != axis]
    total = kept.sum(others) if others else kept
    total = total.to(out.dtype)
    return out.add_(total) if func.__name__ == "index_add_" else out + total
