"""How a tensor of the program is made from tensors of the checkpoint, without holding the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint, as it is."""

    name: str

    def read(self, read: Read) -> torch.Tensor:
        return read(self.name)

    def names(self) -> Iterator[str]:
        yield self.name


@dataclass(frozen=True)
class Stack:
    """Tensors of equal shape [..] stacked along a new first axis: [len(parts), ..]."""

    parts: tuple[Recipe, ...]

    def read(self, read: Read) -> torch.Tensor:
        first = self.parts[0].read(read)
        out = first.new_empty((len(self.parts), *first.shape))
        out[0] = first
        for i, part in enumerate(self.parts[1:], start=1):
            out[i] = part.read(read)
        return out

    def names(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.names()


@dataclass(frozen=True)
class Concat:
    """Tensors joined along the existing axis `dim`."""

    parts: tuple[Recipe, ...]
    dim: int = 0

    def read(self, read: Read) -> torch.Tensor:
        return torch.cat([part.read(read) for part in self.parts], self.dim)

    def names(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.names()


@dataclass(frozen=True)
class Item:
    """One tensor of a stack: `of`[index]."""

    of: Recipe
    index: int

    def read(self, read: Read) -> torch.Tensor:
        return self.of.read(read)[self.index]

    def names(self) -> Iterator[str]:
        yield from self.of.names()


@dataclass(frozen=True)
class Turn:
    """A matrix transposed."""

    of: Recipe

    def read(self, read: Read) -> torch.Tensor:
        return self.of.read(read).transpose(0, 1)

    def names(self) -> Iterator[str]:
        yield from self.of.names()


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a tensor."""

    of: Recipe
    start: int
    stop: int

    def read(self, read: Read) -> torch.Tensor:
        return self.of.read(read)[self.start : self.stop]

    def names(self) -> Iterator[str]:
        yield from self.of.names()


Recipe = Source | Stack | Concat | Item | Turn | Rows
