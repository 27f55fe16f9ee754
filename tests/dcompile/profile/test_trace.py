"""The trace is what Chrome and Perfetto read: spans inside spans, counters, one clock."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dcompile.profile import Capture
from dcompile.profile.summary import Profile
from dcompile.profile.trace import trace

Event = dict[str, Any]
REQUIRED = {
    "X": {"name": str, "cat": str, "ts": float, "dur": float, "pid": int, "tid": int, "args": dict},
    "C": {"name": str, "ts": float, "pid": int, "args": dict},
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
}


@pytest.fixture(scope="module")
def events(captured: Capture, profile: Profile) -> list[Event]:
    read = json.loads(trace(captured, profile))
    assert read["displayTimeUnit"] == "ms"
    return list(read["traceEvents"])


def spans(events: list[Event], kind: str) -> list[Event]:
    return [e for e in events if e["ph"] == "X" and e["cat"] == kind]


def test_every_event_has_the_fields_of_its_kind(events: list[Event]) -> None:
    for event in events:
        required = REQUIRED[event["ph"]]
        assert event.keys() == {"ph", *required}
        for key, kind in required.items():
            assert isinstance(event[key], kind), event
        assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())


def test_spans_nest_and_never_cross(events: list[Event]) -> None:
    open_until: list[float] = []
    last = 0.0
    for event in (e for e in events if e["ph"] == "X"):
        start, end = event["ts"], event["ts"] + event["dur"]
        assert start >= last - 1e-3, "spans come in the order of their starts"
        while open_until and open_until[-1] <= start + 1e-6:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 1e-6, event
        open_until.append(end)
        last = start


def test_every_launch_is_inside_its_iteration(events: list[Event], profile: Profile) -> None:
    iterations, launches = spans(events, "iteration"), spans(events, "launch")
    count = len(profile.places)
    assert len(iterations) == len(profile.iterations)
    assert len(launches) == count * len(iterations)
    for at, iteration in enumerate(iterations):
        inside = launches[at * count : (at + 1) * count]
        assert [e["name"] for e in inside] == [place.name for place in profile.places]
        assert inside[0]["ts"] == iteration["ts"]
        end = inside[-1]["ts"] + inside[-1]["dur"]
        assert end <= iteration["ts"] + iteration["dur"] + 1e-6
    (generate,) = [e for e in events if e["name"] == "generate"]
    assert sum(e["dur"] for e in spans(events, "iteration") + spans(events, "host")) <= (
        generate["dur"] + 1e-3
    )


def test_counters_go_on_in_time_and_end_where_the_generation_does(
    events: list[Event], profile: Profile
) -> None:
    def counter(name: str) -> list[float]:
        found = [e for e in events if e["ph"] == "C" and e["name"] == name]
        assert [e["ts"] for e in found] == sorted(e["ts"] for e in found)
        return [e["args"]["value"] for e in found]

    masks, decided = counter("masks left"), counter("tokens decided")
    assert masks[-1] == 0 and decided == sorted(decided)
    assert decided[-1] == len(profile.prompts) * profile.gen_length
    assert all(1 <= value <= 8 for value in counter("experts a layer"))
    assert len(counter("bytes resident")) == len(profile.iterations)
