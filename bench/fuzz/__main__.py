"""Fuzz the compiler and what it reads: random programs, damaged files, random command lines.

    python bench/fuzz programs|damage|commands [--seed N] [--count N] [--seconds S] [--native N]
    python bench/fuzz [SUBJECT ...] --replay FILE...

Without --seed a new one is drawn and printed; case i of seed s is always the same. A failure is shrunk and
written to --failures (default fuzz-failures/) as a file that --replay runs again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

BENCH = Path(__file__).resolve().parents[1]
# The folder itself stands first when it is run; its parts are found as `fuzz.NAME` only.
sys.path[:1] = [str(BENCH), str(BENCH.parent / "tests" / "support")]
from fuzz.children import Outcome  # noqa: E402

Case = dict[str, Any]


class Subject(Protocol):
    """What is fuzzed."""

    def draw(self, seed: int) -> Case: ...

    def run(self, case: Case) -> Outcome: ...

    def simpler(self, case: Case) -> list[Case]: ...

    def group(self, case: Case) -> str:
        """Under which name outcomes are counted."""
        ...


@dataclass
class Tally:
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    details: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0

    def add(self, group: str, outcome: Outcome) -> None:
        counts = outcome.counts or {outcome.kind: 1}
        self.counts.setdefault(group, Counter()).update(counts)
        if outcome.kind in ("named", "refused"):
            self.details[outcome.detail.partition(":")[0]] += 1
        self.slowest = max(self.slowest, outcome.seconds)
        self.largest = max(self.largest, outcome.memory)

    @property
    def total(self) -> Counter[str]:
        return sum(self.counts.values(), Counter())

    def json(self) -> dict[str, Any]:
        return {
            "total": dict(self.total),
            "by_group": {name: dict(counts) for name, counts in sorted(self.counts.items())},
            "named": dict(self.details.most_common()),
            "failures": self.failures,
            "slowest_cpu_seconds": round(self.slowest, 2),
            "largest_memory_mib": self.largest >> 20,
        }


def subjects() -> dict[str, Callable[..., Subject]]:
    from fuzz.commands import Commands
    from fuzz.damage import Damage
    from fuzz.programs import Programs

    return {"programs": Programs, "damage": Damage, "commands": Commands}


def fuzz(subject: Subject, seed: int, count: int, seconds: float, failures: Path) -> Tally:
    """Run cases until `count` or `seconds`, whichever comes first; failures are shrunk and stored."""
    tally, began, told = Tally(), time.monotonic(), time.monotonic()
    stopped: list[int] = []
    # Interrupted, what was found so far is still told.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(1))
    for index, number in enumerate(_seeds(seed, count)):
        if stopped or time.monotonic() - began > seconds:
            break
        case = subject.draw(number)
        outcome = subject.run(case)
        tally.add(subject.group(case), outcome)
        if outcome.bad:
            tally.failures.append(_store(subject, case, outcome, failures))
        if outcome.bad or time.monotonic() - told > 60:
            told = time.monotonic()
            what = f"{index + 1}: {dict(tally.total)}"
            print(what, f"{outcome.kind}: {outcome.detail}" if outcome.bad else "", flush=True)
    return tally


def _seeds(seed: int, count: int) -> Iterator[int]:
    rng = random.Random(seed)
    for _ in range(count):
        yield rng.getrandbits(48)


def _store(subject: Subject, case: Case, outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Shrink while the failure stays of its kind, and write what is left."""
    shrunk, left = True, 24
    while shrunk and left > 0:
        shrunk = False
        for less in subject.simpler(case):
            left -= 1
            if (found := subject.run(less)).kind == outcome.kind:
                case, outcome, shrunk = less, found, True
                break
            if left <= 0:
                break
    folder.mkdir(parents=True, exist_ok=True)
    name = type(subject).__name__.lower()
    path = folder / f"{name}_{outcome.kind}_{len(list(folder.iterdir()))}.json"
    path.write_text(
        json.dumps({"subject": name, "case": case, "outcome": outcome.json()}, indent=1)
    )
    return {"file": path.name, "kind": outcome.kind, "detail": outcome.detail[:300]}


def replay(paths: list[Path], made: dict[str, Subject]) -> int:
    """Run stored cases again, of the subjects made where there are any; how many still fail."""
    only, failing = set(made), 0
    for path in paths:
        held = json.loads(path.read_text())
        name = held["subject"]
        if only and name not in only:
            continue
        if name not in made:
            made[name] = subjects()[name]()
        outcome = made[name].run(held["case"])
        failing += outcome.bad
        print(f"{path.name}: {outcome.kind}: {outcome.detail}", flush=True)
    return failing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("subject", nargs="?", choices=["programs", "damage", "commands"])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--count", type=int, default=1 << 40)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--native", type=int, default=0, help="programs: build each N-th natively too"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--replay", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.replay and given.subject is None:
        return int(bool(replay(given.replay, {})))
    if given.subject is None:
        parser.error("name what to fuzz, or --replay FILE")
    seed = given.seed if given.seed is not None else int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}", flush=True)
    options = {"native": given.native} if given.native else {}
    began = time.monotonic()
    subject = subjects()[given.subject](**options)
    again = replay(given.replay, {given.subject: subject}) if given.replay else 0
    tally = fuzz(subject, seed, given.count, given.seconds, given.failures)
    report = {"subject": given.subject, "seed": seed, "cases": tally.total.total(), **tally.json()}
    report["seconds"] = round(time.monotonic() - began)
    print(json.dumps(report, indent=1))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(tally.failures or again))


if __name__ == "__main__":
    sys.exit(main())
