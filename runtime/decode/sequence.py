"""A request in a slot: what it was asked, how far it is, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

from dcompile.runtime.decode.requests import Request
from dcompile.runtime.decode.slots import Ints, Slot

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """What one prompt yielded."""

    tokens: list[int]
    """Generated ids before the first end of sequence."""
    all_tokens: list[int]
    """The ids of every position that was asked for."""
    text: str | None
    """`tokens` as text; None where the artifact has no tokenizer."""
    forwards: int
    """Iterations that this prompt took part in."""
    tokens_per_forward: float
    """Positions decoded per iteration, filled-in ends of sequence not counted."""
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Committed:
    """Positions of an answer that no iteration changes any more."""

    start: int
    """The first of them; the answer begins at 0."""
    ids: list[int]
    confidences: list[float | None] | None = None
    """Those with which the tokens were chosen, where the request and the plan have them."""


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
class Served:
    """A request in a slot, on its own clock."""

    number: int
    """Which of the engine's requests it is."""
    request: Request
    slot: Slot
    total: int
    """How many positions it has: prompt, answer, and what rounds it up to whole blocks."""
    limits: Ints
    """How many positions each position sees, [total]."""
    eos_ids: frozenset[int]
    tick: int = 0
    """Iterations that it took part in."""
    decoded: int = 0
    began: float = field(default_factory=perf_counter)
    committed: list[Committed] = field(default_factory=list)
    """What nobody was told yet."""
    confidences: Floats | None = None
    """Of each position, [total], NaN where no token was chosen; None where nobody asked."""

    @property
    def canvas(self) -> Ints:
        return self.slot.canvas

    @property
    def prompt(self) -> int:
        """Where the answer begins."""
        return len(self.request.prompt)

    @property
    def end(self) -> int:
        """Where the answer ends; the last block may go on behind it."""
        return self.prompt + self.request.gen_length

    def complete(self, begin: int, end: int) -> bool:
        """A block is decided, and all before it; True where the answer ends with it."""
        begin, end = max(begin, self.prompt), min(end, self.end)
        self.decoded += end - begin
        stopped = self.request.early_stop and self._stop(end)
        told = None if self.confidences is None else self.confidences[begin:end]
        numbers = None if told is None else [None if np.isnan(x) else float(x) for x in told]
        self.committed.append(
            Committed(begin - self.prompt, self.canvas[begin:end].tolist(), numbers)
        )
        return stopped or end == self.end

    def result(self, text: Callable[[list[int]], str | None]) -> Result:
        """What the request came to; `text` decodes tokens."""
        seconds = perf_counter() - self.began
        generated: list[int] = self.canvas[self.prompt : self.end].tolist()
        tokens = generated[: self._first_eos(generated)]
        return Result(
            tokens=tokens,
            all_tokens=generated,
            text=text(tokens),
            forwards=self.tick,
            tokens_per_forward=self.decoded / self.tick,
            seconds=seconds,
            tokens_per_second=len(tokens) / seconds if seconds > 0 else 0.0,
        )

    def _stop(self, end: int) -> bool:
        """Fill everything after a first end of sequence with it, and say whether there is one."""
        at = self._first_eos(self.canvas[self.prompt : end].tolist())
        if at is None:
            return False
        at += self.prompt
        self.canvas[at : self.end] = self.canvas[at]
        if self.confidences is not None:
            self.confidences[at + 1 :] = np.nan
        self.slot.push()
        return True

    def _first_eos(self, tokens: Sequence[int]) -> int | None:
        return next((at for at, token in enumerate(tokens) if token in self.eos_ids), None)
