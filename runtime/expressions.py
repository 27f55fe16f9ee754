"""Sizes of launches: expressions of R and B, checked once when the plan is read.

7; {"R": 64, "": 7} for 64 R + 7; or one of {"cdiv": [a, b]}, {"min": [...]}, {"max": [...]},
{"sum": [...]}, {"mul": [...]}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import mul
from typing import Any

_DEEPEST = 16
_LARGEST = 1 << 48


def _cdiv(values: Sequence[int]) -> int:
    return -(-values[0] // values[1])


_OPERATORS: Mapping[str, Callable[[Sequence[int]], int]] = {
    "cdiv": _cdiv,
    "min": min,
    "max": max,
    "sum": sum,
    "mul": lambda values: reduce(mul, values, 1),
}


class Expression:
    """A size of R and B; raises ValueError where `text` is none."""

    def __init__(self, text: Any, depth: int = 0) -> None:
        self._rows = self._sequences = self._fixed = 0
        self._operator: Callable[[Sequence[int]], int] | None = None
        self._operands: tuple[Expression, ...] = ()
        if type(text) is int:
            text = {"": text}
        if not isinstance(text, dict) or depth > _DEEPEST:
            raise ValueError(f"{text!r} is no size")
        (first, *rest) = text or {"": 0}
        if first in _OPERATORS:
            if rest or not isinstance(text[first], list) or not text[first]:
                raise ValueError(f"{text!r} is no size")
            self._operator = _OPERATORS[first]
            self._operands = tuple(Expression(each, depth + 1) for each in text[first])
            if first == "cdiv" and (
                len(self._operands) != 2 or (self._operands[1].constant or 0) < 1
            ):
                raise ValueError(f"{text!r} divides by no positive number")
            return
        if not set(text) <= {"R", "B", ""} or any(
            type(term) is not int or abs(term) >= _LARGEST for term in text.values()
        ):
            raise ValueError(f"{text!r} is no size")
        self._rows, self._sequences = text.get("R", 0), text.get("B", 0)
        self._fixed = text.get("", 0)

    @property
    def constant(self) -> int | None:
        """The value where it depends on neither R nor B, and is written as a number."""
        if self._operator is not None or self._rows or self._sequences:
            return None
        return self._fixed

    def __call__(self, R: int, B: int) -> int:
        if self._operator is not None:
            return self._operator([operand(R, B) for operand in self._operands])
        return self._rows * R + self._sequences * B + self._fixed
