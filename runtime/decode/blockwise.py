"""Blocks left to right, one at a time, by the rows that a cache policy chooses."""

from __future__ import annotations

from collections.abc import Sequence

from dcompile.errors import ContractError
from dcompile.runtime.decode.caches import CachePolicy, Moment, Rows, reads_tokens
from dcompile.runtime.decode.requests import Limits
from dcompile.runtime.decode.sequence import Block, Served


class Blockwise:
    """Decides one block after the other; a canvas is the case of one block of all positions.

    (All that a canvas has of its own is that its length is compiled in, which `Limits` checks.)
    `stores`: a finished block is run once more to store its keys and values.
    """

    def __init__(self, served: Served, limits: Limits, cache: CachePolicy, stores: bool) -> None:
        self.served = served
        self._limits, self._cache, self._stores = limits, cache, stores
        self._looks = reads_tokens(cache)
        self._previous: int | None = None
        self._block = self._block_at(limits.begin(served.prompt))
        self._read = self._block.before
        self._decided = self._storing = False

    def deciding(self) -> list[Block]:
        """The block of the next iteration; none where that only stores a finished one."""
        if self._decided and not self._storing:
            self._go_on()
        if self._looks:
            self.served.slot.pull()
            self._read = self.served.canvas[self._block.begin : self._block.end].copy()
        return [] if self._storing else [self._block]

    def rows(self, ahead: int = 0) -> Rows:
        """The rows of the next iteration, or of one so many iterations later in this block."""
        block, shift = self._block, int(self._limits.shift)
        moment = Moment(
            begin=block.begin,
            end=block.end,
            total=self.served.total,
            iteration=block.iteration + ahead,
            tick=self.served.tick + ahead,
            previous=self._previous,
            span=self._limits.span,
            ids=self.served.canvas[block.begin : block.end],
            before=block.before,
            mask_id=self._limits.mask_id,
            shift=shift,
        )
        rows = self._cache(moment)
        if not isinstance(rows, tuple):
            return rows
        # A shifted model chooses a block's first token by the row before it.
        return min(rows[0], max(block.begin - shift, 0)), rows[1]

    def most(self) -> int:
        """How many iterations may run before the host has to look."""
        return 1 if self._looks or self._storing else self._bound - self._block.iteration

    def after(self, performed: Sequence[int], done: Sequence[bool]) -> bool:
        """Count what the deciding blocks came to; True at the end of the answer."""
        if self._storing:
            self.served.tick += 1
            self._storing = False
            return False
        block = self._block
        self.served.tick += performed[0]
        block.iteration += performed[0]
        if self._looks:
            block.before = self._read
        if not done[0]:
            if block.iteration >= self._bound:
                raise endless(self.served, block.begin, block.entered, self._bound)
            return False
        self.served.slot.pull()
        if self.served.complete(block.begin, block.end):
            return True
        self._decided = True
        # Inside a block of the attention mask, the next iterations compute it from its start anyway.
        self._storing = self._stores and block.end % (self._limits.span or 1) == 0
        return False

    @property
    def _bound(self) -> int:
        """The iterations that the block may take: each commits a token."""
        return self._block.entered + int(self.served.request.parameters.get("post_steps", 0)) + 1

    def _go_on(self) -> None:
        self._previous = self._block.begin
        self._block = self._block_at(self._block.end)
        self._decided = False
        self.served.slot.enter()

    def _block_at(self, begin: int) -> Block:
        end = begin + self._limits.block_length
        return Block.of(self.served.canvas, begin, end, self._limits.mask_id)


def endless(served: Served, begin: int, masks: int, bound: int) -> ContractError:
    what = f"{masks} masks are not done after {bound} iterations"
    where = f"prompt {served.number}, position {begin}"
    return ContractError(what, where=where, remedy="report this as a bug of dcompile")
