"""A plan's ATen launches: what no kernel of ours computes, run by torch.

Imported for a plan that has such launches, and with it torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dcompile.errors import ArtifactError, ContractError
from dcompile.runtime.plan import Launch
from dcompile.runtime.state import Binding
from dcompile.runtime.tensors import TORCH, tensor_of


@dataclass(frozen=True)
class AtenCall:
    """One launch over bound buffers."""

    operator: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    writes: tuple[torch.Tensor | None, ...]
    name: str

    def __call__(self) -> None:
        where = f"launch {self.name} ({self.operator})"
        try:
            results = self.operator(*self.args, **self.kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            first = str(error).partition("\n")[0]
            what = f"the plan is damaged: torch refuses an operator's arguments: {first}"
            raise ArtifactError(what, where=where, remedy="compile the model again") from error
        if not isinstance(results, (tuple, list)):
            results = (results,)
        for result, target in zip(results, self.writes, strict=False):
            if target is None:
                continue
            if not isinstance(result, torch.Tensor) or result.shape != target.shape:
                tensor = isinstance(result, torch.Tensor)
                have = list(result.shape) if tensor else type(result).__name__
                what = f"it gave {have} for a buffer of {list(target.shape)}"
                raise ContractError(what, where=where)
            # An operator that wrote in place returns what is already there.
            if result.data_ptr() != target.data_ptr():
                target.copy_(result)


def resolve(launch: Launch) -> torch._ops.OpOverload:
    """The operator of a launch; raises ArtifactError where torch has none that a plan may name."""
    try:
        namespace, name, overload = launch.kernel.split(".")
        if namespace != "aten":
            raise AttributeError(namespace)
        operator = getattr(getattr(torch.ops.aten, name), overload)
    except (AttributeError, ValueError) as error:
        what = f"torch {torch.__version__} has no operator {launch.kernel!r}"
        remedy = "compile the model again with this torch"
        raise ArtifactError(what, where=launch.name, remedy=remedy) from error
    if not isinstance(operator, torch._ops.OpOverload) or not _is_plain(operator, launch):
        what = f"{launch.kernel} is no operator that computes a value from others"
        raise ArtifactError(what, where=launch.name, remedy="compile the model again")
    return operator


def bind(
    binding: Binding, launches: Sequence[Launch], operators: Sequence[torch._ops.OpOverload]
) -> list[AtenCall]:
    """Launches over bound buffers, as tensors of the same memory."""

    def buffer(index: int | None) -> torch.Tensor | None:
        return None if index is None else tensor_of(binding.values(index))

    def value(arg: Any) -> Any:
        if isinstance(arg, list):
            return [value(item) for item in arg]
        if not isinstance(arg, dict):
            return arg
        ((kind, inner),) = arg.items()
        if kind == "b":
            return buffer(inner)
        if kind == "i":
            return inner(binding.R, binding.B)
        return TORCH[inner] if kind == "dtype" else inner

    return [
        AtenCall(
            operator,
            [value(arg) for arg in launch.args],
            {key: value(arg) for key, arg in launch.kwargs.items()},
            tuple(map(buffer, launch.writes)),
            launch.name,
        )
        for launch, operator in zip(launches, operators, strict=True)
    ]


def run(calls: Sequence[AtenCall], threads: int, seconds: npt.NDArray[np.float64] | None) -> None:
    """Run launches one by one; `seconds` takes the time of each."""
    with torch.inference_mode(), _threads(threads):
        for index, call in enumerate(calls):
            began = perf_counter() if seconds is not None else 0.0
            call()
            if seconds is not None:
                seconds[index] = perf_counter() - began


# By name, for what they do besides: read a file, move a tensor's memory, trust their caller.
_UNSAFE = {"from_file", "set_data", "record_stream", "empty_strided", "data"}
_MOVING = ("set_", "resize_", "resize_as_", "as_strided_", "swap", "rename_")


def _is_plain(operator: torch._ops.OpOverload, launch: Launch) -> bool:
    """Whether an operator is meant for any arguments, and changes only what the launch writes."""
    schema = operator._schema
    name = schema.name.removeprefix("aten::")
    spelled = name.startswith("__") and name.endswith("__")  # an operator of Python: `>>`, `&`
    hidden = name.startswith("_") and not spelled
    private = hidden and torch.Tag.core not in operator.tags and name not in _PRIVATE
    if private or name in _UNSAFE or name.startswith(_MOVING):
        return False
    given = dict(zip((a.name for a in schema.arguments), launch.args, strict=False))
    given |= launch.kwargs
    return all(
        isinstance(given.get(a.name), dict) and given[a.name].get("b") in launch.writes
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    )


# Private in torch, and all the same what export writes down for a public function.
_PRIVATE = {
    "_to_copy",
    "_softmax",
    "_log_softmax",
    "_unsafe_view",
    "_unsafe_index",
    "_assert_async",
}


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
