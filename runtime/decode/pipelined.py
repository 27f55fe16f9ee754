"""Pipelined blocks: the next ones are begun before this one is done (D2F, arXiv 2508.09192).

Under a block-causal mask a block can be computed beside those before it. A new one is added when the last
is begun; it commits what is sure, and no more until the one before it is nearly done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass
class Block:
    """A run of positions that is decided together."""

    begin: int
    end: int
    entered: int
    """Masks when it was entered."""
    before: Ints
    """Its tokens as the last iteration read them."""
    iteration: int = 0
    full: bool = True
    """Whether it commits its best token where none is sure."""

    @staticmethod
    def of(canvas: Ints, begin: int, end: int, mask_id: int, full: bool = True) -> Block:
        tokens = canvas[begin:end]
        return Block(begin, end, int((tokens == mask_id).sum()), tokens.copy(), full=full)


@dataclass
class Pipeline:
    """The blocks of one sequence, from the first whose keys and values are not stored.

    `advance` before each iteration, then run `rows` with the blocks that it returned, then `settle`.
    """

    canvas: Ints
    prompt: int
    begin: int
    total: int
    length: int
    mask_id: int
    tau_add: float
    tau_activate: float
    most: int
    """Blocks that may be undecided at a time."""
    stop_ids: frozenset[int]
    """Tokens after which no block is added."""
    cached: bool = True
    """Whether stored blocks are left out of the rows."""
    first: int = 0
    """The first position whose keys and values are not stored."""
    blocks: list[Block] = field(default_factory=list)
    storing: set[int] = field(default_factory=set)
    """Where the blocks begin that the next iteration stores."""
    complete: int = 0
    """The end of the blocks before which nothing is undecided."""

    def left(self, block: Block) -> int:
        return int((self.canvas[block.begin : block.end] == self.mask_id).sum())

    def _decided(self, block: Block) -> float:
        return 1.0 - self.left(block) / block.entered if block.entered else 1.0

    def advance(self) -> list[Block]:
        """Add a block, activate blocks; those that decide in the next iteration."""
        if not self.blocks:
            self.blocks.append(self._new(self.begin, full=True))
        elif self._room() and self._decided(self.blocks[-1]) >= self.tau_add:
            self.blocks.append(self._new(self.blocks[-1].end, full=False))
        for before, block in pairwise(self.blocks):
            block.full = block.full or self._decided(before) >= self.tau_activate
        return [block for block in self.blocks if self.left(block)]

    def _new(self, begin: int, full: bool) -> Block:
        return Block.of(self.canvas, begin, begin + self.length, self.mask_id, full)

    def _room(self) -> bool:
        end = self.blocks[-1].end
        undecided = sum(bool(self.left(block)) for block in self.blocks)
        stopped = np.isin(self.canvas[self.prompt : end], list(self.stop_ids)).any()
        return end < self.total and undecided < self.most and not stopped

    def rows(self) -> tuple[int, int]:
        """From the first position that is not stored to the end of the last block."""
        return self.first, self.blocks[-1].end

    def settle(self, deciding: Sequence[Block]) -> None:
        """After an iteration: what it stored is stored, and finished blocks are to be stored next.

        A block is stored only when none before it is undecided: its keys and values see theirs.
        """
        for block in deciding:
            block.iteration += 1
        if self.cached:
            stored = [block.end for block in self.blocks if block.begin in self.storing]
            self.first = max([self.first, *stored])
            if self.first == 0:
                # The first iteration ran the prompt's whole blocks too.
                self.first = self.begin
        self.storing.clear()
        for block in self.blocks:
            if self.left(block):
                break
            self.complete = block.end
            if block.end > self.first:
                self.storing.add(block.begin)
        # The last block stays: what comes next depends on it.
        self.blocks = [block for block in self.blocks[:-1] if block.end > self.first] + self.blocks[
            -1:
        ]
