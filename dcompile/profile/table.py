"""A profile on the terminal: one screen of where the time went, and two profiles side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dcompile.profile.summary import PHASES, Profile, Row

PLAIN_WIDTH = 132
"""Columns where nobody's terminal says otherwise."""
_RESOURCES = {"registers": "regs", "spills": "spills", "shared": "shared", "occupancy": "occ."}


def console() -> Console:
    """Standard output, in colour on a terminal and wide enough for a table in a file."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(width=PLAIN_WIDTH, highlight=False)


def show(profile: Profile, out: Console, launches: bool = False) -> None:
    """The profile; `launches` adds the table of every launch."""
    out.print(_head(profile))
    out.print(_phases(profile))
    for title, rows in (
        ("kernel", profile.kernels),
        ("layer", profile.layers),
        ("role", profile.roles),
    ):
        out.print(_rows(title, rows, profile))
    if launches:
        named = [_named(row, profile) for row in profile.launches]
        out.print(_rows("launch", named, profile))
    out.print(f"\nmemory    {memory_text(profile)}")
    out.print(f"\n{notes(profile)}")


def _head(profile: Profile) -> str:
    tokens = sum(each.tokens for each in profile.iterations)
    forwards = len(profile.iterations)
    machine = profile.machine
    return (
        f"{profile.artifact}: {profile.target}, {profile.dtype}, {profile.threads} thread(s); "
        f"{len(profile.prompts)} prompt(s), {profile.gen_length} positions each\n"
        f"{tokens} tokens in {forwards} forwards, {tokens / max(forwards, 1):.2f} a forward; "
        f"{profile.wall * 1e3:.2f} ms; "
        f"machine {machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s\n"
    )


def _phases(profile: Profile) -> Table:
    table = Table("phase", title_justify="left", box=None, pad_edge=False)
    for name in ("ms", "% of total", "forwards", "median ms", "rows", "tokens/forward", "experts"):
        table.add_column(name, justify="right")
    table.add_row("load", f"{profile.load * 1e3:.2f}")
    for phase in PHASES:
        found = profile.phase(phase)
        if not found:
            continue
        times = [each.end - each.start for each in found]
        experts = [each.experts for each in found if each.experts is not None]
        table.add_row(
            phase,
            f"{sum(times) * 1e3:.2f}",
            percent(sum(times) / profile.wall),
            str(len(found)),
            f"{statistics.median(times) * 1e3:.3f}",
            f"{statistics.fmean(each.R for each in found):.0f}",
            f"{statistics.fmean(each.tokens for each in found):.2f}",
            f"{statistics.fmean(experts):.1f} of {profile.experts}" if experts else "",
        )
    table.add_row("host", f"{profile.host * 1e3:.2f}", percent(profile.host / profile.wall))
    table.add_row("total", f"{profile.wall * 1e3:.2f}", percent(1))
    return table


def _rows(title: str, rows: Sequence[Row], profile: Profile) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"\n{title}", overflow="fold")
    heads = ("calls", "ms", "% of total", "us an iteration", "quartiles", "MB", "MFLOP")
    resources = [k for k in _RESOURCES if any(k in r for r in profile.resources.values())]
    for name in (*heads, "GB/s", "GFLOP/s", "% of floor", *(_RESOURCES[k] for k in resources)):
        table.add_column(f"\n{name}", justify="right", no_wrap=True)
    for row in rows:
        used = profile.resources.get(row.name, {})
        table.add_row(
            row.name,
            str(row.calls),
            f"{row.total * 1e3:.3f}",
            percent(row.total / profile.wall),
            f"{row.median * 1e6:.1f}",
            f"{row.low * 1e6:.1f}..{row.high * 1e6:.1f}",
            f"{row.bytes / 1e6:.2f}",
            f"{row.flops / 1e6:.1f}",
            f"{row.bandwidth / 1e9:.2f}",
            f"{row.rate / 1e9:.2f}",
            percent(row.of_floor),
            *(str(used.get(k, "")) for k in resources),
        )
    return table


def _named(row: Row, profile: Profile) -> Row:
    place = profile.places[row.launches[0]]
    return Row(**{**vars(row), "name": place.name})


def memory_text(profile: Profile) -> str:
    """What is held, and what most of the scratch is at its fullest."""
    held = profile.memory
    first = ", ".join(f"{h.name} {_size(h.bytes)}" for h in held.buffers[:4])
    return (
        f"weights {_size(held.weights)}, states {_size(held.state)}, "
        f"scratch {_size(held.scratch)} for values of {_size(held.values)}; "
        f"most alive at {held.peak}: {_size(max(held.live, default=0))} ({first}); "
        f"process {_size(max(held.resident, default=0))} resident, "
        f"{_size(held.before)} of it before the artifact was opened"
    )


def notes(profile: Profile) -> str:
    """How to read the numbers, and what measuring them cost."""
    gaps = sum(i.end - i.start for i in profile.iterations) - profile.launched
    return (
        f"Timing costs {profile.overhead * 100:+.1f} % (medians of {len(profile.timed)} rounds each way); "
        f"launches {percent(profile.launched / profile.wall)} % of the total, "
        f"between them {percent(gaps / profile.wall)} %. "
        "Floor: the larger of bytes of weights and caches / bandwidth and FLOPs / rate, both measured "
        "just now; more than 100 % came from a cache. "
        "GB/s, GFLOP/s and % of floor are medians over the iterations."
    )


def percent(share: float) -> str:
    return f"{share * 100:.1f}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
