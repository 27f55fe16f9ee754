"""A capture summed up: launches, kernels, layers, roles, phases, memory and the course of decoding."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dcompile.cost.launches import costs, num_experts
from dcompile.cost.machine import Machine
from dcompile.cost.occupancy import kernel_resources
from dcompile.cost.sources import Place
from dcompile.profile.collect import Capture
from dcompile.profile.denoise import Course, courses, decided, masks_left
from dcompile.profile.memory import Memory, memory
from dcompile.profile.watch import Seen

Phase = Literal["prefill", "refresh", "window"]
PHASES: tuple[Phase, ...] = ("prefill", "refresh", "window")
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """Launches summed: seconds over the generation, and of one iteration (median and quartiles)."""

    name: str
    calls: int
    total: float
    median: float
    low: float
    high: float
    bytes: float
    flops: float
    floor: float
    """Seconds that the bytes and FLOPs take at the machine's rates, the slower of them."""
    bandwidth: float
    """Bytes a second; this and the next two are medians over the iterations."""
    rate: float
    """FLOP a second."""
    of_floor: float
    """Floor over time: 1 is as fast as memory or arithmetic allows; more came from a cache."""
    launches: list[int]


@dataclass(frozen=True)
class Iteration:
    """One iteration: seconds since the generation began, rows, tokens written, experts a layer."""

    phase: Phase
    begin: float
    start: float
    end: float
    R: int
    B: int
    launched: float
    tokens: int
    masks: int
    experts: float | None
    bytes: float
    flops: float
    resident: int


@dataclass(frozen=True)
class Profile:
    """What `dcompile profile` found; times in seconds."""

    artifact: str
    target: str
    dtype: str
    threads: int
    machine: Machine
    prompts: list[int]
    gen_length: int
    load: float
    wall: float
    plain: list[float]
    timed: list[float]
    overhead: float
    places: list[Place]
    launches: list[Row]
    kernels: list[Row]
    layers: list[Row]
    roles: list[Row]
    iterations: list[Iteration]
    experts: int | None
    """Experts of a layer that has any."""
    memory: Memory
    courses: list[Course]
    resources: Mapping[str, Mapping[str, Any]]
    """Registers, spills and the like of each kernel, where the target has them."""

    @property
    def launched(self) -> float:
        return sum(each.launched for each in self.iterations)

    @property
    def host(self) -> float:
        """Seconds in which no iteration ran."""
        return self.wall - sum(each.end - each.start for each in self.iterations)

    def phase(self, name: Phase) -> list[Iteration]:
        return [each for each in self.iterations if each.phase == name]

    def json(self) -> str:
        derived = {"format": FORMAT, "dcompile": version("dcompile")}
        return json.dumps({**derived, **asdict(self)})


def summarize(capture: Capture) -> Profile:
    """The profile of a capture."""
    artifact, request = capture.runner.artifact, capture.request
    places = [_place(launch) for launch in artifact.plan.text["launches"]]
    table = _Table(capture)
    resident = [step.resident for step in capture.seen]
    widest = max(capture.seen, key=lambda step: step.R)
    return Profile(
        artifact=str(artifact.path),
        target=str(artifact.manifest["target"]),
        dtype=str(artifact.manifest["model"]["dtype"]),
        threads=capture.runner.executor.threads,
        machine=capture.machine,
        prompts=[len(ids) for ids in request.prompts],
        gen_length=request.gen_length,
        load=capture.load,
        wall=capture.chosen.wall,
        plain=list(capture.plain),
        timed=list(capture.timed),
        overhead=capture.overhead,
        places=places,
        launches=table.rows((f"{at}", [at]) for at in range(len(places))),
        kernels=table.grouped([place.kernel for place in places]),
        layers=table.grouped([_layer_name(place.layer) for place in places], ordered=True),
        roles=table.grouped([place.role for place in places]),
        iterations=table.iterations(),
        experts=num_experts(capture.plan),
        memory=memory(artifact.plan, widest.R, widest.B, capture.resident, resident),
        courses=courses(capture.seen, request.prompts, request.gen_length),
        resources=kernel_resources(artifact, capture.runner.executor.arch),
    )


class _Table:
    """Seconds, bytes, FLOPs and floor of each launch (columns) in each iteration (rows)."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.seconds = np.stack([each.seconds for each in capture.chosen.iterations])
        work = [costs(capture.plan, capture.facts(at)) for at in range(len(capture.seen))]
        self.bytes = _array([[cost.bytes for cost in row] for row in work])
        self.flops = _array([[cost.flops for cost in row] for row in work])
        self.floor = _array([[cost.seconds(capture.machine) for cost in row] for row in work])
        self.touched = [[c.touched for c in row if c.touched is not None] for row in work]

    def grouped(self, names: Sequence[str], ordered: bool = False) -> list[Row]:
        """Rows of launches of one name, the slowest first, or in the order of the plan."""
        groups: dict[str, list[int]] = {}
        for at, name in enumerate(names):
            groups.setdefault(name, []).append(at)
        rows = self.rows(groups.items())
        return rows if ordered else sorted(rows, key=lambda row: -row.total)

    def rows(self, groups: Iterable[tuple[str, list[int]]]) -> list[Row]:
        return [self._row(name, launches) for name, launches in groups]

    def _row(self, name: str, launches: list[int]) -> Row:
        each = self.seconds[:, launches].sum(axis=1)
        moved, done, floor = (
            table[:, launches].sum(axis=1) for table in (self.bytes, self.flops, self.floor)
        )
        low, median, high = np.quantile(each, [0.25, 0.5, 0.75])
        return Row(
            name=name,
            calls=len(each) * len(launches),
            total=float(each.sum()),
            median=float(median),
            low=float(low),
            high=float(high),
            bytes=float(moved.sum()),
            flops=float(done.sum()),
            floor=float(floor.sum()),
            bandwidth=float(np.median(moved / each)),
            rate=float(np.median(done / each)),
            of_floor=float(np.median(floor / each)),
            launches=launches,
        )

    def iterations(self) -> list[Iteration]:
        request, limits = self.capture.request, self.capture.runner.limits
        out, known = [], set[int]()
        for at, (timed, seen) in enumerate(
            zip(self.capture.chosen.iterations, self.capture.seen, strict=True)
        ):
            fresh = set(seen.prompts.values()) - known
            known |= fresh
            experts = self.touched[at]
            out.append(
                Iteration(
                    phase="prefill" if fresh else _phase(seen, limits.block_length),
                    begin=timed.begin,
                    start=timed.start,
                    end=timed.end,
                    R=seen.R,
                    B=seen.B,
                    launched=float(timed.seconds.sum()),
                    tokens=decided(seen, request.prompts, request.gen_length),
                    masks=masks_left(seen, request.prompts, request.gen_length, limits.mask_id),
                    experts=statistics.fmean(experts) if experts else None,
                    bytes=float(self.bytes[at].sum()),
                    flops=float(self.flops[at].sum()),
                    resident=seen.resident,
                )
            )
        return out


def _array(values: list[list[float]]) -> npt.NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


def _phase(seen: Seen, block: int) -> Phase:
    """A sequence that computes its first rows again, and more than a block, is refreshed."""
    for slot in seen.prompts:
        rows = seen.row_pos[seen.row_seq == slot]
        if len(rows) > block and rows.min() == 0:
            return "refresh"
    return "window"


def _place(launch: Mapping[str, Any]) -> Place:
    return Place(
        name=launch["name"],
        kernel=launch["kernel"],
        layer=launch.get("layer"),
        role=launch.get("role") or launch["kernel"],
        origin=launch.get("origin") or "",
        nodes=list(launch.get("nodes", ())),
    )


def _layer_name(layer: int | None) -> str:
    return "outside" if layer is None else f"layer {layer}"
