"""Pipelined blocks: the next ones are begun before this one is done (D2F, arXiv 2508.09192).

Under a block-causal mask a block can be computed beside those before it. A new one is added when the last
is begun; it commits what is sure, and no more until the one before it is nearly done.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dcompile.runtime.decode.blockwise import endless
from dcompile.runtime.decode.caches import Rows
from dcompile.runtime.decode.requests import Limits
from dcompile.runtime.decode.sequence import Block, Served


class Pipelined:
    """The blocks of one sequence, from the first whose keys and values are not stored.

    `cached`: stored blocks are left out of the rows.
    """

    def __init__(self, served: Served, limits: Limits, cached: bool) -> None:
        self.served = served
        self._limits, self._cached = limits, cached
        parameters = served.request.parameters
        self._tau_add, self._tau_activate = parameters["tau_add"], parameters["tau_activate"]
        self._begin = limits.begin(served.prompt)
        self._first = 0  # the first position whose keys and values are not stored
        self._blocks: list[Block] = []
        self._deciding: list[Block] = []
        self._storing: set[int] = set()  # where the blocks begin that the next iteration stores
        self._complete = 0  # the end of the blocks before which nothing is undecided

    def deciding(self) -> list[Block]:
        """Add a block, activate blocks; those that decide in the next iteration."""
        self.served.slot.pull()
        blocks = self._blocks
        if not blocks:
            blocks.append(self._new(self._begin, full=True))
        elif self._room() and self._decided(blocks[-1]) >= self._tau_add:
            blocks.append(self._new(blocks[-1].end, full=False))
        for before, block in pairwise(blocks):
            block.full = block.full or self._decided(before) >= self._tau_activate
        self._deciding = [block for block in blocks if self._left(block)]
        return self._deciding

    def rows(self, ahead: int = 0) -> Rows:
        """From the first position that is not stored to the end of the last block."""
        assert ahead == 0, "which rows come next depends on what is decided"
        return max(self._first - self._limits.shift, 0), self._blocks[-1].end

    def most(self) -> int:
        """How many iterations may run before the host has to look."""
        return 1

    def after(self, performed: Sequence[int], done: Sequence[bool]) -> bool:
        """Count what the deciding blocks came to; True at the end of the answer."""
        served = self.served
        served.slot.pull()
        served.tick += 1
        before = self._complete
        self._settle()
        for block in self._blocks:
            ended = before <= block.begin and block.end <= self._complete
            if ended and served.complete(block.begin, block.end):
                return True
        # The first block that is not done is fully activated, and so commits a token.
        masks = served.total - served.prompt
        if served.tick > masks:
            raise endless(served, self._begin, masks, masks)
        return False

    def _settle(self) -> None:
        """What the iteration stored is stored, and finished blocks are to be stored next.

        A block is stored only when none before it is undecided: its keys and values see theirs.
        """
        for block in self._deciding:
            block.iteration += 1
        if self._cached:
            stored = [block.end for block in self._blocks if block.begin in self._storing]
            # The first iteration ran the prompt's whole blocks too.
            self._first = max([self._first, *stored]) or self._begin
        self._storing.clear()
        for block in self._blocks:
            if self._left(block):
                break
            self._complete = block.end
            if block.end > self._first:
                self._storing.add(block.begin)
        # The last block stays: what comes next depends on it.
        *earlier, last = self._blocks
        self._blocks = [*(block for block in earlier if block.end > self._first), last]

    def _left(self, block: Block) -> int:
        return int((self.served.canvas[block.begin : block.end] == self._limits.mask_id).sum())

    def _decided(self, block: Block) -> float:
        return 1.0 - self._left(block) / block.entered if block.entered else 1.0

    def _new(self, begin: int, full: bool) -> Block:
        end = begin + self._limits.block_length
        return Block.of(self.served.canvas, begin, end, self._limits.mask_id, full)

    def _room(self) -> bool:
        served, end = self.served, self._blocks[-1].end
        undecided = sum(bool(self._left(block)) for block in self._blocks)
        tokens = served.canvas[served.prompt : end]
        stopped = served.request.early_stop and np.isin(tokens, list(served.eos_ids)).any()
        return end < served.total and undecided < self._limits.blocks and not stopped
