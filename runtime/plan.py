"""The plan: what is launched over which buffers, read from plan.json and checked before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Literal

from dcompile.errors import ArtifactError
from dcompile.runtime.expressions import Expression
from dcompile.runtime.weights import DTYPES

SYMBOLS = ("R", "B")
_LARGEST = 1 << 48
_MOST = {"N": 1 << 16, "L": 1 << 24, "n": 1 << 24}
_REMEDY = "compile the model again"
HOLDS = ("canvas", "kv", "policy", "soft")
"""What a state is: the tokens, keys or values, a decoding policy's own, the mixtures of smoothing."""
_LOOP = {"finished", "performed", "turn", "limit", "go", "wanted"}
"""What the launch that ends a turn on the device is given of the loop's own memory."""

Where = Literal["native", "aten", "cuda"]


@dataclass(frozen=True)
class Size:
    """An affine size: rows * R + sequences * B + fixed."""

    rows: int
    sequences: int
    fixed: int

    def __call__(self, R: int, B: int) -> int:
        return self.rows * R + self.sequences * B + self.fixed

    @property
    def constant(self) -> bool:
        return self.rows == self.sequences == 0

    @property
    def grows(self) -> bool:
        """Whether it never shrinks with R or B; products of such sizes are convex in each."""
        return self.rows >= 0 and self.sequences >= 0


@dataclass(frozen=True)
class Buffer:
    name: str
    dtype: str
    shape: tuple[Size, ...]
    kind: Literal["weight", "state", "input", "slot", "view", "zeroed"]
    tensor: str = ""
    holds: str = ""
    """Of a state, one of HOLDS."""
    slot: int = -1
    base: int = -1
    offset: Size = Size(0, 0, 0)
    strides: tuple[Size, ...] = ()

    def extent(self, R: int, B: int) -> tuple[int, ...]:
        return tuple(size(R, B) for size in self.shape)

    def bytes(self, R: int, B: int) -> int:
        return prod(self.extent(R, B)) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Launch:
    name: str
    kernel: str
    where: Where
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    writes: tuple[int | None, ...]
    grid: tuple[Expression, ...] = ()
    """Programs along each axis, of a CUDA kernel."""

    @property
    def native(self) -> bool:
        return self.where == "native"


@dataclass(frozen=True)
class Plan:
    """Buffers, launches and the runs of launches that go to native code, or into a graph, in one call."""

    text: Mapping[str, Any]
    sizes: Mapping[str, int]
    buffers: tuple[Buffer, ...]
    slots: int
    launches: tuple[Launch, ...]
    regions: tuple[tuple[Where, int, int], ...]
    inputs: Mapping[str, int]
    state: Mapping[str, int]
    outputs: Mapping[str, int]
    loop: Launch | None = None
    """What ends a turn of a loop on the device."""

    @staticmethod
    def read(text: Mapping[str, Any], where: str) -> Plan:
        return _Reader(text, where).plan()

    def holding(self, *kinds: str) -> list[str]:
        """The names of the states of these kinds (see HOLDS), in the plan's order."""
        return [name for name, index in self.state.items() if self.buffers[index].holds in kinds]

    def corners(self) -> Iterator[tuple[int, int]]:
        """The smallest and largest (R, B): an affine size that is sound there is so between."""
        slots = self.sizes["N"]
        return product((1, slots * self.sizes["L"]), (1, slots * self.sizes.get("blocks", 1)))

    def check_weights(self, present: Mapping[str, int]) -> None:
        """Each weight that a buffer names is there, and has at least the bytes that it declares."""
        for buffer in self.buffers:
            if buffer.kind != "weight":
                continue
            if buffer.tensor not in present:
                what = f"the plan needs tensor {buffer.tensor!r}, which no weight file has"
                raise ArtifactError(what, where=f"buffer {buffer.name}", remedy=_REMEDY)
            if present[buffer.tensor] < buffer.bytes(1, 1):
                what = (
                    f"tensor {buffer.tensor!r} has {present[buffer.tensor]} bytes, "
                    f"the plan needs {buffer.bytes(1, 1)}"
                )
                raise ArtifactError(what, where=f"buffer {buffer.name}", remedy=_REMEDY)


class _Reader:
    """Turns JSON into a Plan; every complaint says where in the plan it is."""

    def __init__(self, text: Mapping[str, Any], where: str) -> None:
        self.text, self.where = text, where

    def broken(self, what: str, part: str = "") -> ArtifactError:
        where = f"{self.where}: {part}" if part else self.where
        return ArtifactError(f"the plan is damaged: {what}", where=where, remedy=_REMEDY)

    def plan(self) -> Plan:
        text = self.text
        try:
            if not set(text["symbols"]) <= set(SYMBOLS):
                raise self.broken(f"unknown symbols {text['symbols']}")
            sizes = {key: self._count(value, f"size {key}") for key, value in text["sizes"].items()}
            if any(not 1 <= sizes.get(key, 0) <= most for key, most in _MOST.items()):
                raise self.broken("it does not give sizes N, L and n, or too large ones")
            buffers = tuple(self._buffer(i, item) for i, item in enumerate(text["buffers"]))
            launches = tuple(self._launch(item, len(buffers)) for item in text["launches"])
            plan = Plan(
                text=text,
                sizes=sizes,
                buffers=buffers,
                slots=self._count(text["slots"], "slots"),
                launches=launches,
                regions=self._regions(launches),
                inputs=self._names("inputs", buffers),
                state=self._names("state", buffers),
                outputs=self._names("outputs", buffers),
                loop=self._loop(len(buffers)),
            )
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise self.broken(f"a field is missing or of another type ({error!r})") from error
        self._check(plan)
        return plan

    def _count(self, value: Any, part: str) -> int:
        if type(value) is not int or not 0 <= value < _LARGEST:
            raise self.broken(f"{value!r} is no count", part)
        return value

    def _size(self, value: Any, part: str) -> Size:
        terms = {"": value} if type(value) is int else value
        if (
            not isinstance(terms, dict)
            or not set(terms) <= {*SYMBOLS, ""}
            or any(type(term) is not int or abs(term) >= _LARGEST for term in terms.values())
        ):
            raise self.broken(f"{value!r} is not affine in R and B", part)
        return Size(terms.get("R", 0), terms.get("B", 0), terms.get("", 0))

    def _buffer(self, index: int, item: Mapping[str, Any]) -> Buffer:
        name, place = str(item["name"]), item["place"]
        part, kind = f"buffer {name}", place["kind"]
        if item["dtype"] not in DTYPES:
            raise self.broken(f"unknown dtype {item['dtype']!r}", part)
        if kind not in ("weight", "constant", "state", "input", "slot", "view", "zeroed"):
            raise self.broken(f"unknown place {kind!r}", part)
        return Buffer(
            name=name,
            dtype=item["dtype"],
            shape=tuple(self._size(size, part) for size in item["shape"]),
            kind="weight" if kind == "constant" else kind,
            tensor=str(place["tensor"]) if kind in ("weight", "constant") else "",
            holds=self._holds(index, name, place, part) if kind == "state" else "",
            slot=self._count(place["slot"], part) if kind == "slot" else -1,
            base=self._count(place["of"], part) if kind == "view" else -1,
            offset=self._size(place.get("offset", 0), part),
            strides=tuple(self._size(stride, part) for stride in place.get("strides", ())),
        )

    def _holds(self, index: int, name: str, place: Mapping[str, Any], part: str) -> str:
        """What a state is; of a plan from before plans said so, what its launches show it to be.

        There the tokens are called `canvas`, and what attention takes of the state is keys and values.
        Anything else counts as a policy's, which is safe: a request begins with zeros in it.
        """
        holds = place.get("holds")
        if holds is None:
            attention = [item for item in self.text["launches"] if item.get("role") == "attend"]
            read = any({"b": index} in item["args"] for item in attention)
            return "canvas" if name == "canvas" else "kv" if read else "policy"
        if holds not in HOLDS:
            raise self.broken(f"a state that holds {holds!r}", part)
        return str(holds)

    def _launch(self, item: Mapping[str, Any], buffers: int) -> Launch:
        kernel, where = str(item["kernel"]), item["where"]
        part = f"launch {item['name']} ({kernel})"
        if where not in ("native", "aten", "cuda"):
            raise self.broken(f"it runs neither native nor as aten nor as cuda but {where!r}", part)
        launch = Launch(
            name=str(item["name"]),
            kernel=kernel,
            where=where,
            args=[self._argument(arg, buffers, part) for arg in item["args"]],
            kwargs={
                key: self._argument(arg, buffers, part)
                for key, arg in item.get("kwargs", {}).items()
            },
            writes=tuple(item["writes"]),
            grid=self._grid(item["grid"], part) if where == "cuda" else (),
        )
        for written in launch.writes:
            if written is not None and (type(written) is not int or not 0 <= written < buffers):
                raise self.broken(f"it writes buffer {written!r}, which is not there", part)
        if where != "aten" and not all(
            isinstance(arg, dict) and arg.keys() & {"b", "i", "f"} for arg in launch.args
        ):
            raise self.broken(f"a {where} argument is no buffer, size or number", part)
        if where == "cuda" and {"b": None} in launch.args:
            raise self.broken("a cuda argument is null", part)
        return launch

    def _loop(self, buffers: int) -> Launch | None:
        item = self.text.get("loop")
        if item is None:
            return None
        part = f"the loop's launch ({item['kernel']})"
        args = [
            arg if arg.keys() == {"loop"} else self._argument(arg, buffers, part)
            for arg in item["args"]
        ]
        if any(arg["loop"] not in _LOOP for arg in args if "loop" in arg) or {"b": None} in args:
            raise self.broken("it asks for memory that no loop has", part)
        grid = self._grid(item["grid"], part)
        return Launch("loop", str(item["kernel"]), "cuda", args, {}, (), grid)

    def _grid(self, text: Any, part: str) -> tuple[Expression, ...]:
        if not isinstance(text, list) or len(text) != 3:
            raise self.broken(f"{text!r} is no grid", part)
        try:
            return tuple(map(Expression, text))
        except ValueError as error:
            raise self.broken(str(error), part) from error

    def _argument(self, arg: Any, buffers: int, part: str) -> Any:
        """The argument with its sizes read; everything else as it stands."""
        if isinstance(arg, list):
            return [self._argument(item, buffers, part) for item in arg]
        if not isinstance(arg, dict):
            return arg
        if len(arg) != 1:
            raise self.broken(f"cannot read argument {arg!r}", part)
        ((kind, value),) = arg.items()
        if kind == "i":
            return {"i": self._size(value, part)}
        if kind == "b" and (value is None or (type(value) is int and 0 <= value < buffers)):
            return arg
        if kind == "f" and type(value) in (int, float):
            return {"f": float(value)}
        if kind == "dtype" and value in DTYPES:
            return arg
        if kind == "device" and value == "cpu":
            return arg
        raise self.broken(f"cannot read argument {arg!r}", part)

    def _regions(self, launches: Sequence[Launch]) -> tuple[tuple[Where, int, int], ...]:
        regions: list[tuple[Where, int, int]] = []
        at = 0
        for item in self.text["regions"]:
            kind, start, end = item["kind"], item["start"], item["end"]
            if start != at or not start <= end <= len(launches):
                raise self.broken("the regions do not cover the launches one after another")
            if any(launch.where != kind for launch in launches[start:end]):
                raise self.broken(f"region {start}:{end} of {kind} launches has others in it")
            regions.append((kind, start, end))
            at = end
        if at != len(launches):
            raise self.broken("the regions do not cover the launches one after another")
        return tuple(regions)

    def _names(self, key: str, buffers: Sequence[Buffer]) -> dict[str, int]:
        names: dict[str, int] = self.text[key]
        for name, index in names.items():
            if self._count(index, f"{key} {name}") >= len(buffers):
                raise self.broken(f"buffer {index} is not there", f"{key} {name}")
            kind = buffers[index].kind
            if kind != {"inputs": "input", "state": "state"}.get(key, kind):
                raise self.broken(f"buffer {buffers[index].name} is placed as {kind}", key)
        return dict(names)

    def _check(self, plan: Plan) -> None:
        for index, buffer in enumerate(plan.buffers):
            part = f"buffer {buffer.name}"
            self._check_shape(plan, buffer, part)
            if buffer.kind == "slot" and buffer.slot >= plan.slots:
                raise self.broken(f"slot {buffer.slot} of {plan.slots}", part)
            if buffer.kind == "view":
                self._check_view(plan, index, part)
            if buffer.kind == "input" and index not in plan.inputs.values():
                raise self.broken("an input buffer has no input", part)
            if buffer.kind == "state" and index not in plan.state.values():
                raise self.broken("a state buffer has no state", part)
        for launch in plan.launches:
            for written in launch.writes:
                if written is None:
                    continue
                if plan.buffers[base_of(plan.buffers, written)].kind == "weight":
                    raise self.broken("it writes to a weight", f"launch {launch.name}")

    def _check_shape(self, plan: Plan, buffer: Buffer, part: str) -> None:
        for R, B in plan.corners():
            extent = buffer.extent(R, B)
            if min(extent, default=0) < 0 or buffer.bytes(R, B) >= _LARGEST:
                raise self.broken(f"shape {list(extent)} at R={R} B={B}", part)
        moving = sum(not size.constant for size in buffer.shape)
        if buffer.kind in ("weight", "state") and moving:
            raise self.broken(f"the shape of a {buffer.kind} depends on the rows", part)
        # So that what holds at the corners holds between them: see Plan.corners.
        if moving > 1 and buffer.kind != "view":
            raise self.broken("two of its axes depend on the rows", part)
        if not all(size.grows for size in (*buffer.shape, *buffer.strides)):
            raise self.broken("a size shrinks as rows are added", part)

    def _check_view(self, plan: Plan, index: int, part: str) -> None:
        buffer = plan.buffers[index]
        root = base_of(
            plan.buffers, index, lambda: self.broken("a view of itself or of nothing", part)
        )
        base = plan.buffers[root]
        if base.dtype != buffer.dtype or len(buffer.strides) != len(buffer.shape):
            raise self.broken("a view differs from its base in dtype, or lacks strides", part)
        for R, B in plan.corners():
            extent = buffer.extent(R, B)
            strides = [stride(R, B) for stride in buffer.strides]
            first = _offset(plan.buffers, index, R, B)
            # An empty view is bounded too: native code gets its address.
            last = first + sum((n - 1) * s for n, s in zip(extent, strides, strict=True))
            last = first - 1 if 0 in extent else last
            if first < 0 or min(strides, default=0) < 0 or last >= prod(base.extent(R, B)):
                raise self.broken(f"a view ends outside {base.name} at R={R} B={B}", part)


def _offset(buffers: Sequence[Buffer], index: int, R: int, B: int) -> int:
    """Where a view begins, in elements of the buffer that it lies in."""
    first = 0
    while buffers[index].kind == "view":
        if buffers[index].offset(R, B) < 0:
            return -1
        first += buffers[index].offset(R, B)
        index = buffers[index].base
    return first


def base_of(buffers: Sequence[Buffer], index: int, error: Any = None) -> int:
    """The buffer that a view, or a view of a view, lies in."""
    for _ in range(len(buffers)):
        if buffers[index].kind != "view":
            return index
        index = buffers[index].base
        if index >= len(buffers):
            break
    raise error() if error else AssertionError("views were checked when the plan was read")
