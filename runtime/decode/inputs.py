"""What the loop writes for an iteration, and what a plan must have for it to be written."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcompile.errors import ArtifactError
from dcompile.runtime.decode.sequence import Block, Served
from dcompile.runtime.decode.slots import Ints
from dcompile.runtime.decode.smoothing import soft_threshold, soft_weight
from dcompile.runtime.plan import Plan, Size
from dcompile.runtime.state import Binding

_ROWS = ("row_seq", "row_pos", "row_limit")
_ROW_WEIGHTS = ("row_weight",)
_BLOCKS = ("block_seq", "block_pos", "choice_row")
_CLOCKS = ("iteration", "entered", "temperature", "seed", "tick", "prompt_end", "full")


def check_inputs(plan: Plan, parameters: set[str], where: str) -> None:
    """Inputs and `done` are there, with the shapes and dtypes that the loop fills and reads."""
    known = {*_ROWS, *_ROW_WEIGHTS, *_BLOCKS, *_CLOCKS, *parameters}
    if unknown := sorted(set(plan.inputs) - known):
        what = f"the plan has an input that nothing provides: {unknown[0]!r}"
        raise ArtifactError(what, where=where, remedy="compile the model again")
    if "done" not in plan.outputs:
        raise ArtifactError("the plan has no output 'done'", where=where)
    one, block = (Size(0, 1, 0),), (Size(0, 1, 0), Size(0, 0, plan.sizes["n"]))
    wanted: dict[str, tuple[tuple[Size, ...], str]] = dict.fromkeys(plan.inputs, (one, "f32"))
    wanted |= dict.fromkeys({"block_seq", *_CLOCKS} - {"temperature"}, (one, "i64"))
    wanted |= dict.fromkeys(("block_pos", "choice_row"), (block, "i64"))
    wanted |= dict.fromkeys(_ROWS, ((Size(1, 0, 0),), "i64"))
    wanted |= dict.fromkeys(_ROW_WEIGHTS, ((Size(1, 0, 0),), "f32"))
    for name, index in (*plan.inputs.items(), ("done", plan.outputs["done"])):
        shape, dtype = wanted.get(name, (one, "bool"))
        if (plan.buffers[index].shape, plan.buffers[index].dtype) != (shape, dtype):
            what = f"the plan is damaged: {name!r} has another shape or dtype than the loop's"
            raise ArtifactError(what, where=where, remedy="compile the model again")


def fill_rows(binding: Binding, at: int, served: Served, positions: Ints) -> None:
    """Write the rows of one sequence, from row `at` on, into the inputs that the plan reads."""
    values: dict[str, Any] = {
        "row_seq": served.slot.index,
        "row_pos": positions,
        "row_limit": served.limits[positions],
    }
    if "row_weight" in binding.arrays:
        values["row_weight"] = soft_weight(served.tick, served.request.parameters["smoothing"])
    for name, value in values.items():
        if name in binding.arrays:
            binding.arrays[name][at : at + len(positions)] = value


def fill_block(
    binding: Binding,
    place: int,
    at: int,
    served: Served,
    block: Block,
    positions: Ints,
    shift: bool,
) -> None:
    """Write a block, the clocks and the settings of one sequence, whose rows begin at row `at`."""
    own = np.arange(block.begin, block.end, dtype=np.int64)
    chosen = np.maximum(own - 1, 0) if shift else own
    # Where a decided position has no row of its own, any row will do: nothing is chosen there.
    row = np.minimum(np.searchsorted(positions, chosen), len(positions) - 1)
    values: dict[str, Any] = {
        "block_seq": served.slot.index,
        "block_pos": own,
        "choice_row": row + at,
        "iteration": block.iteration,
        "entered": block.entered,
        "temperature": served.request.temperature,
        "seed": served.request.seed,
        "tick": served.tick,
        "prompt_end": served.prompt,
        "full": block.full,
        **served.request.parameters,
    }
    if "row_weight" in binding.arrays and "threshold" in values:
        values["threshold"] = soft_threshold(served.tick, values["threshold"])
    for name, value in values.items():
        if name in binding.arrays:
            binding.arrays[name][place] = value
