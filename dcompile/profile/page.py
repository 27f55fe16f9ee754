"""A profile as one self-contained page: no network, light and dark, from a phone to a desk."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from dcompile.cost.sources import graph_lines, source_of
from dcompile.profile.plots import MOST_BARS, numbered, pictures
from dcompile.profile.summary import PHASES, Profile
from dcompile.profile.table import memory_text, notes, percent
from dcompile.runtime.artifact import Artifact

Cell = tuple[str, float | str]
"""What a cell shows, and what it sorts by."""
_PHASE_HEADS = ("phase", "ms", "% of total", "forwards", "median ms", "rows", "tokens a forward")
_KERNEL_HEADS = (
    *("kernel", "#", "calls", "ms", "% of total", "us an iteration", "quartiles"),
    *("MB", "MFLOP", "GB/s", "GFLOP/s", "% of floor"),
)
_RESOURCES = ("registers", "spills", "shared", "occupancy")
MOST_LINES = 400


@dataclass(frozen=True)
class Explained:
    """A kernel, its source and the graph lines that its launches stand for."""

    name: str
    file: str
    text: str
    lines: list[str]


def page(profile: Profile, artifact: Artifact) -> str:
    """The page as HTML text; raises OptionError without matplotlib."""
    template = resources.files("dcompile.profile").joinpath("page.html").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    resource_heads = _resources(profile)
    return environment.from_string(template).render(
        profile=profile,
        title=f"Profile of {Path(profile.artifact).name}",
        subtitle=_subtitle(profile),
        facts=_facts(profile),
        phases=list(_phases(profile)),
        phase_heads=_PHASE_HEADS,
        kernels=list(_kernels(profile, resource_heads)),
        kernel_heads=(*_KERNEL_HEADS, *resource_heads),
        numbered=numbered(profile.kernels),
        pictures=pictures(profile),
        hidden_layers=max(len(profile.layers) - MOST_BARS, 0),
        memory=memory_text(profile),
        notes=notes(profile),
        sources=list(_sources(profile, artifact)),
    )


def _subtitle(profile: Profile) -> str:
    machine = profile.machine
    return (
        f"{profile.target}, {profile.dtype}, {profile.threads} thread(s); {len(profile.prompts)} "
        f"prompt(s), {profile.gen_length} positions each. Measured here: "
        f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s."
    )


def _facts(profile: Profile) -> Iterator[tuple[str, str]]:
    tokens, forwards = sum(i.tokens for i in profile.iterations), len(profile.iterations)
    experts = [i.experts for i in profile.iterations if i.experts is not None]
    yield f"{profile.wall * 1e3:.1f} ms", "generation"
    yield f"{tokens / profile.wall:.0f}", "tokens a second"
    yield f"{forwards}", "forwards"
    yield f"{tokens / max(forwards, 1):.2f}", "tokens a forward"
    yield f"{percent(profile.launched / profile.wall)} %", "of the time in launches"
    floor = sum(row.floor for row in profile.kernels)
    yield f"{percent(floor / profile.launched)} %", "floor over launch time"
    if experts:
        yield f"{statistics.fmean(experts):.1f} of {profile.experts}", "experts touched a layer"
    yield f"{profile.load * 1e3:.0f} ms", "load"
    yield f"{profile.overhead * 100:+.1f} %", "what timing costs"


def _phases(profile: Profile) -> Iterator[list[Cell]]:
    for phase in PHASES:
        found = profile.phase(phase)
        if not found:
            continue
        times = [each.end - each.start for each in found]
        yield [
            (phase, phase),
            *(_ms(sum(times)), _share(sum(times) / profile.wall), _count(len(found))),
            *(_ms(statistics.median(times)), _count(statistics.fmean(i.R for i in found))),
            _number(statistics.fmean(each.tokens for each in found), 2),
        ]
    blank: list[Cell] = [("", -1.0)] * 4
    yield [("host", "host"), _ms(profile.host), _share(profile.host / profile.wall), *blank]


def _kernels(profile: Profile, resource_heads: list[str]) -> Iterator[list[Cell]]:
    for number, row in numbered(profile.kernels):
        used = profile.resources.get(row.name, {})
        yield [
            (row.name, row.name),
            *(_count(number), _count(row.calls), _ms(row.total)),
            *(_share(row.total / profile.wall), _number(row.median * 1e6, 1)),
            (f"{row.low * 1e6:.1f}..{row.high * 1e6:.1f}", row.high - row.low),
            *(_number(row.bytes / 1e6, 2), _number(row.flops / 1e6, 1)),
            *(_number(row.bandwidth / 1e9, 2), _number(row.rate / 1e9, 2)),
            _share(row.of_floor),
            *((str(used.get(head, "")), used.get(head, -1)) for head in resource_heads),
        ]


def _resources(profile: Profile) -> list[str]:
    """Columns that only a target with such resources has."""
    return [head for head in _RESOURCES if any(head in r for r in profile.resources.values())]


def _sources(profile: Profile, artifact: Artifact) -> Iterator[Explained]:
    for row in profile.kernels:
        source = source_of(artifact, row.name)
        lines = list(graph_lines(artifact, [profile.places[at] for at in row.launches]))
        yield Explained(
            name=row.name,
            file=source.file if source else "torch",
            text=source.text if source else "",
            lines=lines[:MOST_LINES],
        )


def _ms(seconds: float) -> Cell:
    return _number(seconds * 1e3, 3)


def _share(share: float) -> Cell:
    return percent(share), share


def _count(value: float) -> Cell:
    return f"{value:.0f}", value


def _number(value: float, digits: int) -> Cell:
    return f"{value:.{digits}f}", value
