"""The page's pictures, drawn by matplotlib as SVG that takes its colours from the page.

SVG from matplotlib because it is text of a few kilobytes with nothing to run: the page needs no
script for it (plotly's is 4 MB, bokeh's and vega's 1), prints, and the same profile gives the same
bytes. Colours are drawn as stand-ins and replaced by CSS variables, so one picture serves light and
dark; each is drawn twice, wide and narrow, so that text keeps its size on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from dcompile.errors import OptionError
from dcompile.profile.denoise import Course
from dcompile.profile.summary import Profile, Row

WIDTHS = {"wide": 11.0, "narrow": 3.7}  # inches, of 72 units each
INK, MUTED, GRID, FILL = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0a0a{i:02x}" for i in range(8))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FILL: "fill"} | {
    color: f"s{i}" for i, color in enumerate(SERIES)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
MOST_BARS, MOST_PROMPTS = 40, 4


@dataclass(frozen=True)
class Picture:
    """One picture in both widths, as SVG."""

    wide: str
    narrow: str


Draw = Callable[[Any, bool], None]
"""Draws into a figure; the flag says that it is narrow."""


def pictures(profile: Profile) -> dict[str, Picture]:
    """The pictures of a profile by name; raises OptionError without matplotlib."""
    layers = min(len(profile.layers), MOST_BARS)
    prompts = min(len(profile.courses), MOST_PROMPTS)
    return {
        "roofline": _picture("roofline", 4.4, lambda f, n: _roofline(profile, f, n)),
        "layers": _picture("layers", 1.4 + 0.22 * layers, lambda f, n: _layers(profile, f, n)),
        "roles": _picture("roles", 1 + 0.22 * len(profile.roles), lambda f, n: _roles(profile, f)),
        "course": _picture("course", 2.9 * prompts + 1.9, lambda f, n: _course(profile, f)),
        "memory": _picture("memory", 2.6, lambda f, n: _memory(profile, f, n)),
    }


def _picture(name: str, height: float, draw: Draw) -> Picture:
    return Picture(*(_svg(f"{name}-{size}", width, height, draw) for size, width in WIDTHS.items()))


def _svg(name: str, width: float, height: float, draw: Draw) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        what = "the page's pictures need matplotlib, which is not installed"
        raise OptionError(what, where="--html", remedy="pip install 'dcompile[html]'") from error
    narrow = width < 6
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height * (1.6 if narrow and name[:4] == "memo" else 1)))
        draw(figure, narrow)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _for_the_page(out.getvalue(), name)


def _for_the_page(svg: str, name: str) -> str:
    """Inline SVG: no prolog, names of its own, the page's colours and font, titles as tooltips."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}.', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}.", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font)", svg)
    svg = re.sub(r'<g id="[^"]*\.tip:([^"]*)">', r"<g><title>\1</title>", svg)
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg \1role="img"', svg, count=1).replace(
        f'height="{_height(svg)}"', "", 1
    )


def _height(svg: str) -> str:
    found = re.search(r'height="([^"]*)"', svg)
    return found.group(1) if found else ""


def _tip(text: str) -> str:
    """What a mark shows under the pointer, carried as the mark's id."""
    return "tip:" + escape(text, quote=True)


def _roofline(profile: Profile, figure: Any, narrow: bool) -> None:
    axes, machine = figure.subplots(), profile.machine
    ridge = machine.rate / machine.bandwidth
    busy = [row for row in profile.kernels if row.flops > 0]
    intensity = [row.flops / row.bytes for row in busy]
    low, high = min([*intensity, ridge]) / 4, max([*intensity, ridge]) * 4
    roof = np.geomspace(low, high, 200)
    axes.plot(
        roof, np.minimum(roof * machine.bandwidth, machine.rate) / 1e9, color=MUTED, linewidth=1.5
    )
    axes.axvline(ridge, color=GRID, linewidth=1)
    for number, row in enumerate(profile.kernels, start=1):
        # What does no arithmetic stands on the left edge: its bandwidth under the same roof.
        x = row.flops / row.bytes if row.flops else low
        y = (row.rate if row.flops else row.bandwidth * low) / 1e9
        _point(axes, profile, row, number, x, y)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("FLOPs a byte")
    axes.set_ylabel("GFLOP/s")
    text = f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s measured"
    axes.set_title(text, loc="left", fontsize=8.5, color=MUTED)


def _point(axes: Any, profile: Profile, row: Row, number: int, x: float, y: float) -> None:
    share = row.total / profile.wall
    (mark,) = axes.plot(
        x,
        y,
        "o",
        markersize=5 + 22 * share**0.5,
        markerfacecolor=SERIES[0] if row.flops else "none",
        markeredgecolor=SERIES[0],
        alpha=0.75,
        clip_on=False,
    )
    mark.set_gid(_tip(f"{row.name}: {share:.1%} of the time, {row.of_floor:.0%} of the floor"))
    inside = share > 0.04 and row.flops > 0
    # Neighbours have numbers near each other: they stand above and below in turn.
    offset = (0, 0) if inside else (5, 7 if number % 2 else -7)
    axes.annotate(
        str(number),
        (x, y),
        xytext=offset,
        textcoords="offset points",
        ha="center" if inside else "left",
        va="center",
        fontsize=8,
    )


def _layers(profile: Profile, figure: Any, narrow: bool) -> None:
    axes = figure.subplots()
    rows, roles = profile.layers[:MOST_BARS], [row.name for row in profile.roles]
    left = np.zeros(len(rows))
    for at, role in enumerate([*roles[:7], "other"]):
        wanted = {role} if role != "other" else set(roles[7:])
        each = [_spent(profile, row, wanted) * 1e3 for row in rows]
        if any(each):
            bars = axes.barh(
                range(len(rows)), each, left=left, color=SERIES[at], label=role, height=0.72
            )
            for bar, row, spent in zip(bars, rows, each, strict=True):
                bar.set_gid(_tip(f"{row.name}, {role}: {spent:.3f} ms"))
        left += each
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms over the generation")
    figure.legend(
        loc="outside upper left",
        ncols=2 if narrow else 8,
        fontsize=8,
        handlelength=1,
        handleheight=1,
    )


def _spent(profile: Profile, row: Row, roles: set[str]) -> float:
    return sum(
        profile.launches[at].total for at in row.launches if profile.places[at].role in roles
    )


def _roles(profile: Profile, figure: Any) -> None:
    axes = figure.subplots()
    rows = profile.roles
    spread = [[r.median - r.low for r in rows], [r.high - r.median for r in rows]]
    bars = axes.barh(
        range(len(rows)),
        [r.median * 1e6 for r in rows],
        color=SERIES[0],
        height=0.72,
        xerr=np.array(spread) * 1e6,
        error_kw={"ecolor": INK, "elinewidth": 1},
    )
    for at, (bar, row) in enumerate(zip(bars, rows, strict=True)):
        bar.set_gid(_tip(f"{row.name}: median {row.median * 1e6:.1f} us, {row.calls} calls"))
        axes.annotate(
            f"{row.of_floor:.0%}",
            (row.high * 1e6, at),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=MUTED,
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("us an iteration; % of floor")


def _course(profile: Profile, figure: Any) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shown = profile.courses[:MOST_PROMPTS]
    # The ends of viridis vanish on a dark page and on a light one.
    colors = LinearSegmentedColormap.from_list(
        "mid", colormaps["viridis"](np.linspace(0.2, 0.9, 64))
    )
    ratios = [1.0, *[2.6] * len(shown)]
    count, *maps = figure.subplots(
        1 + len(shown), 1, sharex=True, height_ratios=ratios, squeeze=False
    )[:, 0]
    count.bar(
        range(len(profile.iterations)),
        [each.tokens for each in profile.iterations],
        width=0.9,
        color=[SERIES[_PHASE_COLORS[each.phase]] for each in profile.iterations],
    )
    for phase, color in _PHASE_COLORS.items():
        if profile.phase(phase):  # type: ignore[arg-type]
            count.bar([0], [0], color=SERIES[color], label=phase)
    count.set_ylabel("tokens")
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, handlelength=1, handleheight=1)
    for axes, course in zip(maps, shown, strict=True):
        _decisions(axes, course, colors)
        axes.set_ylim(course.end - 0.5, course.begin - 0.5)
        axes.set_ylabel("position" if len(shown) == 1 else f"prompt {course.prompt}")
    maps[-1].set_xlabel("iteration")
    scale = ScalarMappable(Normalize(0, 1), colors)
    bar = figure.colorbar(scale, ax=maps, location="bottom", aspect=40, fraction=0.06, pad=0.02)
    bar.set_label("confidence when decided")
    bar.outline.set_visible(False)


def _decisions(axes: Any, course: Course, colors: Callable[[float], Any]) -> None:
    """Each position: pale while it is masked, then one cell as sure as its decision was."""
    found = course.decisions
    at = np.array([d.iteration for d in found])
    positions = [d.position for d in found]
    masked = {"left": course.first - 0.5, "color": FILL, "height": 1, "linewidth": 0}
    axes.barh(positions, at - course.first, **masked)
    sure = [MUTED if d.confidence is None else colors(d.confidence) for d in found]
    cells = axes.barh(positions, 1, left=at - 0.5, height=1, color=sure)
    for cell, d in zip(cells, found, strict=True):
        known = "unknown" if d.confidence is None else f"{d.confidence:.3f}"
        text = f"position {d.position}, iteration {d.iteration}, token {d.token}"
        cell.set_gid(_tip(f"{text}, confidence {known}"))


_PHASE_COLORS = {"prefill": 1, "refresh": 2, "window": 0}


def _memory(profile: Profile, figure: Any, narrow: bool) -> None:
    held = profile.memory
    first, second = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    launches = range(len(held.live))
    first.fill_between(launches, np.array(held.live) / 1e6, step="mid", color=SERIES[0], alpha=0.8)
    first.axhline(held.scratch / 1e6, color=MUTED, linewidth=1, linestyle="--")
    first.set_xlabel("launch of the widest step")
    first.set_ylabel("MB of scratch alive")
    iterations = range(len(held.resident))
    second.plot(iterations, (np.array(held.resident) - held.before) / 1e6, color=SERIES[0])
    second.set_xlabel("iteration")
    second.set_ylabel("MB resident, above start")
    for axes in (first, second):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)


def numbered(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Kernels with the numbers that the roofline gives them."""
    return list(enumerate(rows, start=1))
