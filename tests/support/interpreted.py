"""Runs a lowering on CPU tensors through the interpreter, over poisoned scratch."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import interpreter  # first of all: it makes this process interpret
import torch

from dcompile.codegen.triton.variant import Lowering, Number, Operand, Scratch, Step, evaluate

assert interpreter

TYPES = {
    **{"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64},
    **{"i32": torch.int32, "u8": torch.uint8, "bool": torch.bool},
}


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose every element is wrong: NaN, or -77."""
    if dtype == torch.bool:
        return torch.full(shape, True)
    return torch.full(shape, math.nan if dtype.is_floating_point else -77, dtype=dtype)


def run(lowering: Lowering, tensors: Mapping[str, torch.Tensor], **symbols: int) -> None:
    """Launch every step; `tensors` by the operands' names, results among them; symbols R and B."""
    scratch = {s.name: _scratch(s, symbols) for s in lowering.scratch}
    for step in lowering.steps:
        _launch(step, tensors, scratch, symbols)
    for one in lowering.scratch:
        assert not one.zeroed or not scratch[one.name].any(), f"{one.name} is not zero again"


def _scratch(one: Scratch, symbols: Mapping[str, int]) -> torch.Tensor:
    size, dtype = evaluate(one.elements, symbols), TYPES[one.dtype]
    return torch.zeros(size, dtype=dtype) if one.zeroed else poisoned(size, dtype=dtype)


def _launch(
    step: Step,
    tensors: Mapping[str, torch.Tensor],
    scratch: Mapping[str, torch.Tensor],
    symbols: Mapping[str, int],
) -> None:
    values: dict[str, Any] = {}
    for parameter, binding in zip(step.variant.arguments, step.bindings, strict=True):
        if isinstance(binding, Number):
            number = binding.value
            values[parameter.name] = (
                number if isinstance(number, float) else evaluate(number, symbols)
            )
            continue
        tensor = (tensors if isinstance(binding, Operand) else scratch)[binding.name]
        assert parameter.type == _pointer(tensor), f"{step.variant.name}: {parameter.name}"
        assert tensor.is_contiguous() or parameter.name in ("gate", "up")
        values[parameter.name] = tensor
    for name, value in step.variant.constants:
        values[name] = _resolve(value) if isinstance(value, str) else value
    grid = tuple(evaluate(axis, symbols) for axis in step.variant.grid)
    _resolve(step.variant.kernel)[grid](**values)


def _pointer(tensor: torch.Tensor) -> str:
    from dcompile.codegen.triton.variant import TRITON_TYPES

    (short,) = (name for name, dtype in TYPES.items() if dtype == tensor.dtype)
    return f"*{TRITON_TYPES[short]}"


def _resolve(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
