"""What an operator must do, and what of its operands a launch of it has and touches.

Nothing here needs torch: artifacts are read, profiled and explained without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol


class Rates(Protocol):
    """A machine: bytes read from memory and FLOP done a second, at best."""

    @property
    def bandwidth(self) -> float: ...

    @property
    def rate(self) -> float: ...


@dataclass(frozen=True)
class Work:
    """Bytes moved and FLOPs done; `touched` counts the experts that a look at the router found.

    `streamed` are the bytes among them that no cache can have kept: weights of a product, and keys
    and values that were not written just now.
    """

    bytes: float
    flops: float
    streamed: float = 0
    touched: int | None = None

    def seconds(self, machine: Rates) -> float:
        """The floor: no machine of these rates is faster."""
        return max(self.streamed / machine.bandwidth, self.flops / machine.rate)


@dataclass(frozen=True)
class Extent:
    """One operand: its shape for the operator, and the bytes of the tensor that holds it.

    The bytes follow from no shape: a packed or quantised tensor has its own.  They are 0 where the
    launch has the operand in no memory, because it is fused away or another launch touches it.
    """

    shape: tuple[int, ...]
    bytes: float

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def each(self) -> float:
        """Bytes of one element."""
        return self.bytes / max(self.elements, 1)


class Operands:
    """An operator's operands and results by name; one that is not given has no bytes."""

    def __init__(self, given: Mapping[str, Extent]) -> None:
        self._given = given

    def __getitem__(self, name: str) -> Extent:
        return self._given[name]

    def bytes(self, *names: str) -> float:
        """Bytes of those together, once each; of all without a name."""
        return sum(self._given[n].bytes for n in names or self._given if n in self._given)

    def elements(self, name: str) -> int:
        """0 where it is not given."""
        return self._given[name].elements if name in self._given else 0


@dataclass(frozen=True)
class Touched:
    """What an iteration ran over of an operator's operands; None where nobody has looked."""

    fresh: int = 0
    """Rows of the iteration: as many keys were written just now."""
    seen: int = 0
    """Keys that all rows of the operator attend to together."""
    read: int = 0
    """Keys that memory gives: each sequence's once."""
    live: int | None = None
    """Candidates that are still undecided; all by default."""
    experts: int | None = None
    """Experts that have a row; by default what uniform routing reads."""
    slots: int | None = None
    """Choices of an expert, where limits may have emptied some; all by default."""
