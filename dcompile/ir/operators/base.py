"""What an operator is to the passes, the code generators, the exports and the costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dcompile.ir.work.formulas import Counter

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Operator:
    """An operator as it stands in a graph, and everything about it that no target decides."""

    overload: torch._ops.OpOverload
    reference: Callable[..., Any]
    """What it means: the registered formula itself, which runs on any machine."""
    results: tuple[str, ...]
    """Names of what it returns, for `work`; arguments have those of the schema."""
    work: Counter
    body: Callable[..., Any] | None = None
    """The same in ATen alone, without a shape or branch that depends on data: for `.pt2`."""

    @property
    def name(self) -> str:
        return self.overload._schema.name.partition("::")[2]

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of its arguments and results."""
        return (*(a.name for a in self.overload._schema.arguments), *self.results)
