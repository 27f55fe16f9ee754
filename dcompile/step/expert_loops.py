"""Loops over experts that pick tokens by their data, traced as masks.

    for e in hit:                                 rows = torch.where(mask[e])
        y = experts[e](x[rows]) * w[rows, slots]  out.index_add_(0, rows, y)

picks a number of rows that only the data knows, which export cannot trace.  Here `nonzero` and `where`
give a `Picked`: the values of all places, and the mask of those that count.  Operators on it compute all
places; added back, the places outside the mask add nothing.  The loop runs over all experts: one that
nothing chose has an empty mask.  Whatever else is done with a `Picked` is an error that names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dcompile.step.masked_values import Hit, Mask, Picked, apply, look_up, refuse, unknown


class MaskedLoops(TorchFunctionMode):
    """Traces what picks tokens by their data as masks; everything else as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.hits: list[tuple[Tensor, Tensor]] = []  # (mask's sum, or that > 0; the mask)
        self.parts: list[Tensor] | None = None  # of the mask that is looped over

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "where" and len(args) == 1 and not kwargs:
            return self._nonzero(args[0], True)
        if name == "nonzero":
            return self._nonzero(args[0], bool(kwargs.get("as_tuple", args[1:] == (True,))))
        if name == "__getitem__" and isinstance(args[0], Tensor):
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(k, Picked) for k in keys):
                return look_up(args[0], keys)
            if any(isinstance(k, Hit) for k in keys):
                found = [k.key if isinstance(k, Hit) else k for k in keys]
                out = func(args[0], tuple(found))
                self._follow(name, args, out)
                return out
        elif any(isinstance(a, Picked) for a in args):
            return apply(func, args, kwargs)
        out = func(*args, **kwargs)
        self._follow(name, args, out)
        return out

    def _follow(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        """Remember sums of masks over all axes but the experts', whether they are > 0, and parts."""
        if name == "sum" and isinstance(args[0], Tensor) and out.dim() == 1:
            self.hits.append((out, args[0]))
        elif name in ("greater", "gt", "__gt__") and args[1] == 0:
            self.hits += [(out, mask) for total, mask in self.hits if total is args[0]]
        elif name in ("__getitem__", "squeeze") and any(args[0] is p for p in self.parts or ()):
            assert self.parts is not None
            self.parts.append(out)

    def _loop(self, mask: Tensor, axes: int) -> Iterator[Hit]:
        """All experts.  One that was not hit adds nothing, as masks inside are parts of this one."""
        self.parts = [mask]
        try:
            for expert in range(int(mask.shape[0])):
                yield Hit(expert, axes)
        finally:
            self.parts = None

    def _nonzero(self, x: Tensor, as_tuple: bool) -> Any:
        if self.parts is not None and not any(x is part for part in self.parts):
            raise unknown("a loop over the experts hit uses another mask")
        masks = [mask for hit, mask in self.hits if hit is x and x.dtype == torch.bool]
        where = x if x.dtype == torch.bool else x != 0
        mask = Mask(where, (lambda axes: self._loop(masks[0], axes)) if masks else None)
        found = tuple(Picked(mask, None, axis, not as_tuple) for axis in range(where.dim()))
        if as_tuple:
            return found
        return found[0] if where.dim() == 1 else refuse("nonzero")


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """While inside, the model picks no tokens by their data.

    Models of `transformers` run their experts' loop as written rather than a kernel that sorts tokens.
    """
    restore: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation") and id(config) not in restore:
            restore[id(config)] = config, config._experts_implementation
            config._experts_implementation = "eager"
    try:
        with MaskedLoops():
            yield
    finally:
        for config, was in restore.values():
            config._experts_implementation = was
