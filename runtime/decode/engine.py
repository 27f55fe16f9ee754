"""The engine: requests enter and leave between turns, and each is told what becomes of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Self

import numpy as np

from dcompile.errors import Full, RequestError
from dcompile.runtime.decode.blockwise import Blockwise
from dcompile.runtime.decode.caches import none, stores_blocks
from dcompile.runtime.decode.loaded import Loaded
from dcompile.runtime.decode.pipelined import Pipelined
from dcompile.runtime.decode.requests import Request
from dcompile.runtime.decode.sequence import Committed, Result, Served
from dcompile.runtime.decode.slots import Slot
from dcompile.runtime.decode.step import Manager, Part, Stepper


@dataclass(frozen=True)
class Admitted:
    """The request has a slot."""


@dataclass(frozen=True)
class Finished:
    """The answer is there."""

    result: Result


@dataclass(frozen=True)
class Cancelled:
    """Nobody works on the request any more: it was cancelled, or the engine closed."""


@dataclass(frozen=True)
class Failed:
    """The request cannot be finished; the others go on."""

    error: BaseException


Event = Admitted | Committed | Finished | Cancelled | Failed
Emit = Callable[[Sequence[Event]], None]
"""Takes all that a turn brought a request, in order; the last of all is no Admitted or Committed."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """A request that an engine took."""

    number: int
    """How many it took before."""
    request: Request
    emit: Emit = field(repr=False)
    positions: int
    """How many positions of a slot it will take."""


@dataclass(frozen=True, eq=False)
class _Running:
    ticket: Ticket
    manager: Manager

    @property
    def served(self) -> Served:
        return self.manager.served


class Engine:
    """Serves requests in the slots of a runner, which are its own until it is closed.

    `submit`, `cancel` and `close` may be called from any thread, also from within `emit`; the rest
    belongs to the one that turns.  `waiting` requests and `waiting_positions` of them may wait at most
    (None: any number).  Raises RequestError where another engine has the runner's slots.
    """

    def __init__(
        self,
        runner: Loaded,
        *,
        waiting: int | None = 512,
        waiting_positions: int | None = 1 << 20,
    ) -> None:
        if not runner.slots_taken.acquire(blocking=False):
            what = "another engine serves requests in the runner's slots"
            raise RequestError(what, remedy="close it, or submit to it")
        self._runner, self._executor, self._limits = runner, runner.executor, runner.limits
        self._stepper = Stepper(runner.executor, runner.limits.max_length, runner.limits.shift)
        self._most_waiting, self._most_positions = waiting, waiting_positions
        self._lock = Lock()
        self._waiting: deque[Ticket] = deque()
        self._cancelled: set[Ticket] = set()
        self._taken = 0
        self._taking, self._admitting, self._closed, self._over = True, True, False, False
        self._free: list[Slot] = runner.slots[::-1]
        self._running: list[_Running] = []
        self._news: dict[Ticket, list[Event]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        """Close; what is left is told so, unless an error is under way."""
        self.close()
        if kind is None:
            while self.turn():
                pass
        self._give_back()

    def submit(self, request: Request, emit: Emit) -> Ticket:
        """Let a request wait for a slot; `emit` is called by `turn`, once a turn at most.

        Raises Full where too many wait or the engine ends, RequestError where it cannot be served.
        """
        asked = self._limits.settle(request, f"prompt {self._taken}")
        needed = self._limits.total(len(asked.prompt), self._limits.rounded(asked.gen_length))
        with self._lock:
            self._check_room(needed)
            ticket = Ticket(self._taken, asked, emit, needed)
            self._taken += 1
            self._waiting.append(ticket)
        if self._free:
            self._executor.wanted[0] = 1
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request before the next turn, whose slot is free then; nothing where it ended already."""
        with self._lock:
            self._cancelled.add(ticket)
        self._executor.wanted[0] = 1

    def close(self) -> None:
        """Take no more requests; the next turn cancels all there are and gives the slots back."""
        with self._lock:
            self._taking, self._closed = False, True
        self._executor.wanted[0] = 1

    def turn(self) -> bool:
        """Cancel, admit, step, tell; False where there was nothing to do.

        What fails is told to the request that it concerns; what an `emit` raises is raised here, and
        the others are told in the next turn.
        """
        if self._over:
            return False
        self._executor.wanted[0] = 0
        self._hear()
        self._admit()
        busy = bool(self._running or self._news)
        if self._running:
            self._step()
        self._tell()
        if self._closed and not self._news:
            self._give_back()
        return busy

    def drain(self, seconds: float) -> list[Ticket]:
        """Take and admit no more, and turn until the running requests end or the time is over.

        Returns the tickets of those that have not ended: waiting or running.
        """
        with self._lock:
            self._taking = self._admitting = False
        end = perf_counter() + seconds
        while self._running and perf_counter() < end:
            self.turn()
        with self._lock:
            return [*(each.ticket for each in self._running), *self._waiting]

    def _check_room(self, needed: int) -> None:
        if not self._taking:
            raise Full("the engine takes no more requests", remedy="ask another one")
        remedy = "ask again later"
        if self._most_waiting is not None and len(self._waiting) >= self._most_waiting:
            raise Full(f"{len(self._waiting)} requests wait already", remedy=remedy)
        if self._most_positions is None:
            return
        positions = sum(ticket.positions for ticket in self._waiting)
        if positions + needed > self._most_positions:
            raise Full(f"requests of {positions} positions wait already", remedy=remedy)

    def _hear(self) -> None:
        """End what was cancelled."""
        with self._lock:
            gone, self._cancelled = self._cancelled, set()
            if self._closed:
                gone |= {*self._waiting, *(each.ticket for each in self._running)}
            if not gone:
                return
            unserved = [ticket for ticket in self._waiting if ticket in gone]
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in gone)
        for ticket in unserved:
            self._note(ticket, Cancelled())
        for running in [each for each in self._running if each.ticket in gone]:
            self._end(running, Cancelled())

    def _admit(self) -> None:
        while self._free and self._admitting:
            with self._lock:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            slot = self._free.pop()
            try:
                self._running.append(_Running(ticket, self._seat(ticket, slot)))
            except Exception as error:
                self._free.append(slot)
                self._note(ticket, Failed(error))
            else:
                self._note(ticket, Admitted())

    def _seat(self, ticket: Ticket, slot: Slot) -> Manager:
        asked, limits, runner = ticket.request, self._limits, self._runner
        slot.admit(asked.prompt)
        total = ticket.positions
        span = limits.span or total
        seen = (np.arange(total, dtype=np.int64) // span + 1) * span
        told = asked.confidences and {"commit", "confidence"} <= runner.artifact.plan.outputs.keys()
        served = Served(
            number=ticket.number,
            request=asked,
            slot=slot,
            total=total,
            limits=np.minimum(seen, total),
            eos_ids=limits.eos_ids,
            confidences=np.full(total, np.nan) if told else None,
        )
        if limits.pipelined:
            return Pipelined(served, limits, cached=runner.cache is not none)
        stores = stores_blocks(runner.artifact.manifest["options"])
        return Blockwise(served, limits, runner.cache, stores)

    def _step(self) -> None:
        parts: dict[_Running, Part] = {}
        for running in tuple(self._running):
            with self._failing(running):
                parts[running] = Part.of(running.manager)
        if not parts:
            return
        try:
            ends = self._stepper.run(list(parts.values()), self._runner.watch)
        except BaseException as error:
            # Nobody knows whose fault it is, and what the slots hold now is half an iteration's.
            for running in parts:
                self._end(running, Failed(error))
            if isinstance(error, Exception):
                return
            raise
        for running, (performed, done) in zip(parts, ends, strict=True):
            with self._failing(running):
                if running.manager.after(performed, done):
                    result = running.served.result(self._runner.decode)
                    self._end(running, Finished(result))
                self._note(running.ticket, *_committed(running))

    @contextmanager
    def _failing(self, running: _Running) -> Iterator[None]:
        """What is raised inside is this request's own failure."""
        try:
            yield
        except Exception as error:
            self._end(running, Failed(error))

    def _end(self, running: _Running, event: Event) -> None:
        self._running.remove(running)
        self._free.append(running.served.slot)
        self._note(running.ticket, *_committed(running), event)

    def _note(self, ticket: Ticket, *events: Event) -> None:
        if events:
            self._news.setdefault(ticket, []).extend(events)

    def _tell(self) -> None:
        for ticket in sorted(self._news, key=lambda each: each.number):
            ticket.emit(self._news.pop(ticket))

    def _give_back(self) -> None:
        if not self._over:
            self._over = True
            self._runner.slots_taken.release()


def _committed(running: _Running) -> list[Committed]:
    found, running.served.committed = running.served.committed, []
    return found
