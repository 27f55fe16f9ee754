"""Two profiles side by side, with ratios; the other one may have been stored as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dcompile.errors import OptionError
from dcompile.profile.summary import FORMAT, PHASES, Profile

_REMEDY = "give an artifact, or what `dcompile profile --json` printed"


@dataclass(frozen=True)
class Side:
    """What is compared of a profile: seconds of one generation by what they were spent on."""

    name: str
    prompts: list[int]
    gen_length: int
    totals: dict[str, float]
    forwards: int
    tokens: int
    tables: dict[str, dict[str, float]]


def side(profile: Profile | dict[str, Any], name: str) -> Side:
    """One side, from a profile or from its JSON as read back."""
    found = json.loads(profile.json()) if isinstance(profile, Profile) else profile
    iterations = found["iterations"]
    totals = {"load": found["load"], "total": found["wall"]}
    for phase in PHASES:
        if each := [i for i in iterations if i["phase"] == phase]:
            totals[phase] = sum(i["end"] - i["start"] for i in each)
    totals["host"] = found["wall"] - sum(i["end"] - i["start"] for i in iterations)
    return Side(
        name=name,
        prompts=found["prompts"],
        gen_length=found["gen_length"],
        totals=totals,
        forwards=len(iterations),
        tokens=sum(i["tokens"] for i in iterations),
        tables={
            key: {row["name"]: row["total"] for row in found[f"{key}s"]}
            for key in ("kernel", "layer", "role")
        },
    )


def stored(path: Path) -> Side:
    """A profile from its JSON file; raises OptionError where it is none."""
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise OptionError(
                f"the profile has format {found['format']}", where=str(path), remedy=_REMEDY
            )
        return side(found, str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"this is no profile ({type(error).__name__})"
        raise OptionError(what, where=str(path), remedy=_REMEDY) from error


def show(ours: Side, theirs: Side, out: Console) -> None:
    """Ours beside theirs; a ratio above 1 says that ours takes longer."""
    if (ours.prompts, ours.gen_length) != (theirs.prompts, theirs.gen_length):
        out.print("The profiles are of different requests: read the shares, not the ratios.\n")
    out.print(f"A  {ours.name}: {ours.tokens} tokens in {ours.forwards} forwards")
    out.print(f"B  {theirs.name}: {theirs.tokens} tokens in {theirs.forwards} forwards\n")
    out.print(_table("phase", ours.totals, theirs.totals))
    for key in ("kernel", "layer", "role"):
        out.print(_table(f"\n{key}", ours.tables[key], theirs.tables[key]))


def _table(title: str, ours: dict[str, float], theirs: dict[str, float]) -> Table:
    table = Table(title, box=None, pad_edge=False)
    lead = "\n" if title.startswith("\n") else ""
    for head in ("A ms", "B ms", "A/B", "A-B ms"):
        table.add_column(lead + head, justify="right")
    for name in _names(ours, theirs):
        a, b = ours.get(name), theirs.get(name)
        table.add_row(
            name,
            _ms(a),
            _ms(b),
            f"{a / b:.2f}" if a is not None and b else "",
            f"{((a or 0) - (b or 0)) * 1e3:+.3f}",
        )
    return table


def _names(ours: dict[str, float], theirs: dict[str, float]) -> Sequence[str]:
    """The union, ours in its order."""
    return list(dict.fromkeys([*ours, *theirs]))


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"
