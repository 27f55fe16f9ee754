"""One step for all sequences: their inputs side by side, and iterations while the rows are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dcompile.runtime.backend import Backend
from dcompile.runtime.decode.caches import Rows
from dcompile.runtime.decode.inputs import fill_block, fill_rows
from dcompile.runtime.decode.sequence import Block, Served
from dcompile.runtime.decode.slots import Ints
from dcompile.runtime.state import Binding
from dcompile.runtime.turns import Bools, Turns, repeat


class Watch(Protocol):
    """Launches a generation's steps in the runner's place, to see what happens in them."""

    def launch(self, binding: Binding, prompts: Mapping[int, int]) -> None:
        """Run one step; `prompts` says which prompt each active slot serves."""


class Manager(Protocol):
    """Which blocks of a sequence are decided when, and over which rows.

    Before each step `deciding`, then `rows`, then the step runs, then `after`.
    """

    served: Served

    def deciding(self) -> list[Block]:
        """Begin an iteration: the blocks that it decides."""

    def rows(self, ahead: int = 0) -> Rows:
        """The rows of the next iteration, or of one so many iterations later."""

    def most(self) -> int:
        """How many iterations may run before the host has to look."""

    def after(self, performed: Sequence[int], done: Sequence[bool]) -> bool:
        """Count what each deciding block came to; True at the end of the answer.

        Raises ContractError where a block takes more iterations than it can.
        """


@dataclass
class Part:
    """One sequence's part of a step."""

    manager: Manager
    blocks: list[Block]
    rows: Rows

    @staticmethod
    def of(manager: Manager) -> Part:
        blocks = manager.deciding()
        return Part(manager, blocks, manager.rows())

    @property
    def served(self) -> Served:
        return self.manager.served


class Stepper:
    """Runs steps of an executor over the parts of all sequences."""

    def __init__(self, executor: Backend, length: int, shift: bool) -> None:
        self._executor, self._shift = executor, shift
        self._smooth = "row_weight" in executor.plan.inputs
        self._positions = np.arange(length + 1, dtype=np.int64)

    def run(self, parts: Sequence[Part], watch: Watch | None) -> list[tuple[list[int], list[bool]]]:
        """Iterate until the host has something to decide.

        Of each part: how many iterations each of its blocks took, and whether it is done.
        """
        turns = self._turns(parts)
        places = [self._places(part.rows) for part in parts]
        binding = self._executor.bind(
            sum(map(len, places)), sum(len(part.blocks) for part in parts)
        )
        self._fill(binding, parts, places)
        if watch is None:
            ran = self._executor.repeat(binding, turns)
        else:
            ran = self._watched(watch, binding, turns, parts)
        if any(part.served.confidences is not None for part in parts):
            _note_confidences(binding, parts)
        ends, at = [], 0
        for part in parts:
            mine = slice(at, at + len(part.blocks))
            ends.append((ran.performed[mine], ran.done[mine]))
            at = mine.stop
        return ends

    def _turns(self, parts: Sequence[Part]) -> int:
        """How many iterations may run over the same rows before the cache policy wants others."""
        # Nor does smoothing take more turns than are needed: each changes what masks are embedded as.
        if self._smooth or any(part.served.confidences is not None for part in parts):
            return 1
        most, turns = min(part.manager.most() for part in parts), 1
        while turns < most and all(part.manager.rows(turns) == part.rows for part in parts):
            turns += 1
        return turns

    def _places(self, rows: Rows) -> Ints:
        return self._positions[rows[0] : rows[1]] if isinstance(rows, tuple) else rows

    def _fill(self, binding: Binding, parts: Sequence[Part], places: Sequence[Ints]) -> None:
        at = place = 0
        for part, positions in zip(parts, places, strict=True):
            fill_rows(binding, at, part.served, positions)
            for block in part.blocks:
                fill_block(binding, place, at, part.served, block, positions, self._shift)
                place += 1
            at += len(positions)

    def _watched(self, watch: Watch, binding: Binding, turns: int, parts: Sequence[Part]) -> Turns:
        served = {part.served.slot.index: part.served.number for part in parts}
        done = self._executor.plan.outputs["done"]

        def step() -> Bools:
            watch.launch(binding, served)
            return binding.values(done).copy()

        return repeat(step, binding.arrays, turns, wanted=self._executor.wanted)


def _note_confidences(binding: Binding, parts: Sequence[Part]) -> None:
    """Keep those with which the iteration committed tokens."""
    outputs = binding.plan.outputs
    found = binding.values(outputs["confidence"])
    commit = binding.values(outputs["commit"]) != 0
    place = 0
    for part in parts:
        for block in part.blocks:
            held = part.served.confidences
            if held is not None:
                held[block.begin : block.end][commit[place]] = found[place][commit[place]]
            place += 1
