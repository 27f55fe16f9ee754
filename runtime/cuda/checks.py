"""Holds a plan's launches to the kernels that they name, before any of them runs.

Arguments are of the kernels' kinds and dtypes, aligned pointers are aligned for every R and B, grids are
what the driver takes, and no launch reads a value that another has overwritten. What a kernel touches
inside its buffers is its own affair: cubins do not say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dcompile.errors import ArtifactError
from dcompile.runtime.cuda.table import Argument, Entry
from dcompile.runtime.plan import Launch, Plan, Size, base_of
from dcompile.runtime.weights import DTYPES

_REMEDY = "compile the model again"
_TYPES = {
    "f32": "fp32",
    "bf16": "bf16",
    "f16": "fp16",
    "f64": "fp64",
    "i64": "i64",
    "i32": "i32",
    "i16": "i16",
    "i8": "i8",
    "u8": "u8",
    "bool": "i1",
}
_BYTES = {"i1", "u8", "i8"}
"""What holds a truth or a small number is read alike."""
_GRID = ((1 << 31) - 1, 65535, 65535)
LOOP_TYPES = dict.fromkeys(("finished", "turn", "limit", "go", "wanted"), "i32")
LOOP_TYPES["performed"] = "i64"


def check_launches(plan: Plan, entries: Mapping[str, Entry]) -> None:
    """Raise ArtifactError at the first launch that its kernel cannot take."""
    for launch in (*plan.launches, *([plan.loop] if plan.loop else [])):
        _check(plan, launch, entries[launch.kernel])
    _follow(plan)


def _check(plan: Plan, launch: Launch, entry: Entry) -> None:
    if len(launch.args) != len(entry.arguments):
        what = f"it has {len(launch.args)} arguments, its kernel takes {len(entry.arguments)}"
        raise _broken(what, launch)
    for argument, given in zip(entry.arguments, launch.args, strict=True):
        ((kind, value),) = given.items()
        if argument.pointer != (kind in ("b", "loop")):
            raise _broken(f"argument {argument.name} is of another kind ({kind!r})", launch)
        if kind == "loop":
            _same(argument, LOOP_TYPES[value], launch)
        elif kind == "b":
            _same(argument, _TYPES[plan.buffers[value].dtype], launch)
            if argument.aligned and not _is_aligned(plan, value):
                raise _broken(f"argument {argument.name} does not start at 16 bytes", launch)
        elif (kind == "f") != (argument.type in ("fp32", "fp64")):
            raise _broken(f"argument {argument.name} is of another kind ({kind!r})", launch)
        elif kind == "i":
            _check_integer(plan, argument, value, launch)
    for R, B in plan.corners():
        programs = [expression(R, B) for expression in launch.grid]
        if any(not 0 <= count <= most for count, most in zip(programs, _GRID, strict=True)):
            raise _broken(f"a grid of {programs} programs at R={R} B={B}", launch)


def _same(argument: Argument, dtype: str, launch: Launch) -> None:
    wanted = argument.type[1:]
    if wanted != dtype and not {wanted, dtype} <= _BYTES:
        raise _broken(f"argument {argument.name} is {dtype}, not {wanted}", launch)


def _check_integer(plan: Plan, argument: Argument, value: Size, launch: Launch) -> None:
    bits = 8 * argument.size - 1
    for R, B in plan.corners():
        if not -(1 << bits) <= value(R, B) < 1 << bits:
            raise _broken(f"argument {argument.name} is {value(R, B)} at R={R} B={B}", launch)
    if argument.aligned and any(part % 16 for part in (value.rows, value.sequences, value.fixed)):
        raise _broken(f"argument {argument.name} is no multiple of 16", launch)


def _is_aligned(plan: Plan, index: int) -> bool:
    """Whether a buffer starts at a multiple of 16 bytes for every R and B."""
    while plan.buffers[index].kind == "view":
        buffer = plan.buffers[index]
        item = DTYPES[buffer.dtype].itemsize
        parts = (buffer.offset.rows, buffer.offset.sequences, buffer.offset.fixed)
        if any(part * item % 16 for part in parts):
            return False
        index = buffer.base
    return True


def _follow(plan: Plan) -> None:
    """Follow which value a slot holds: results that are read must still be there.

    What no launch declares to write is scratch, which its launches hand to each other.
    """
    buffers = plan.buffers
    results = {base_of(buffers, w) for launch in plan.launches for w in _written(launch)}
    owner: dict[int, int] = {}
    for launch in plan.launches:
        writes = {base_of(buffers, w) for w in _written(launch)}
        given = {base_of(buffers, arg["b"]) for arg in launch.args if "b" in arg}
        for root in writes - given:
            what = f"it writes {buffers[root].name}, which is not among its arguments"
            raise _broken(what, launch)
        for root in (given & results) - writes:
            if buffers[root].kind == "slot" and owner.get(buffers[root].slot) != root:
                what = f"it reads {buffers[root].name}, which is overwritten or not computed"
                raise _broken(what, launch)
        touched: dict[int, int] = {}
        for root in sorted(given | writes):
            slot = buffers[root].slot
            if buffers[root].kind == "slot" and touched.setdefault(slot, root) != root:
                raise _broken(f"it uses slot {slot} for two values", launch)
        owner |= touched
    for name, index in plan.outputs.items():
        root = base_of(buffers, index)
        if buffers[root].kind == "slot" and owner.get(buffers[root].slot) != root:
            what = f"the plan is damaged: output {name!r} is overwritten or never computed"
            raise ArtifactError(what, remedy=_REMEDY)


def _written(launch: Launch) -> Iterator[int]:
    return (w for w in launch.writes if w is not None)


def _broken(what: str, launch: Launch) -> ArtifactError:
    where = f"launch {launch.name} ({launch.kernel})"
    return ArtifactError(f"the plan is damaged: {what}", where=where, remedy=_REMEDY)
