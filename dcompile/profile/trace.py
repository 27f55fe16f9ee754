"""A profile as trace events, which chrome://tracing and ui.perfetto.dev open.

One track holds spans inside spans: load, generate, in it each iteration after the host's part, in that
its launches. The clock of a region gives lengths, so launches stand one after the other from the
iteration's start. Counters: masks left, tokens decided, experts a layer, bytes resident.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dcompile.cost.launches import costs
from dcompile.profile.collect import Capture
from dcompile.profile.summary import Profile

Event = dict[str, Any]
_PROCESS, _THREAD = 1, 1


def trace(capture: Capture, profile: Profile) -> str:
    """The trace as JSON text."""
    events = [*_names(profile), *_spans(capture, profile), *_counters(profile)]
    return json.dumps(
        {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"artifact": profile.artifact, "threads": profile.threads},
        }
    )


def _names(profile: Profile) -> Iterator[Event]:
    names = (("process_name", f"dcompile {profile.artifact}"), ("thread_name", profile.target))
    for name, text in names:
        yield {"name": name, "ph": "M", "pid": _PROCESS, "tid": _THREAD, "args": {"name": text}}


def _spans(capture: Capture, profile: Profile) -> Iterator[Event]:
    yield _span("load", "phase", 0, _ns(profile.load))
    zero = _ns(profile.load)
    whole = {"prompts": len(profile.prompts), "positions": profile.gen_length}
    yield _span("generate", "phase", zero, zero + _ns(profile.wall), whole)
    for at, iteration in enumerate(profile.iterations):
        begin, start, end = (
            zero + _ns(t) for t in (iteration.begin, iteration.start, iteration.end)
        )
        yield _span("host", "host", begin, start)
        seen = {"iteration": at, "rows": iteration.R, "sequences": iteration.B}
        yield _span(iteration.phase, "iteration", start, end, seen | {"tokens": iteration.tokens})
        # Cut to whole nanoseconds each, so that no rounding carries the last over the end.
        now = start
        work = costs(capture.plan, capture.facts(at))
        for place, took, cost in zip(
            profile.places, capture.chosen.iterations[at].seconds, work, strict=True
        ):
            told: Event = {"kernel": place.kernel, "role": place.role, "module": place.origin}
            told |= {"bytes": cost.bytes, "flops": cost.flops}
            yield _span(place.name, "launch", now, now + _ns(took), told)
            now += _ns(took)


def _counters(profile: Profile) -> Iterator[Event]:
    zero, decided = _ns(profile.load), 0
    for iteration in profile.iterations:
        at = zero + _ns(iteration.end)
        decided += iteration.tokens
        yield _counter("masks left", at, iteration.masks)
        yield _counter("tokens decided", at, decided)
        if iteration.experts is not None:
            yield _counter("experts a layer", at, iteration.experts)
        yield _counter("bytes resident", at, iteration.resident)


def _span(name: str, kind: str, start: int, end: int, args: Event | None = None) -> Event:
    """A complete event; trace times are microseconds."""
    return {
        "name": name,
        "cat": kind,
        "ph": "X",
        "ts": start / 1e3,
        "dur": (end - start) / 1e3,
        "pid": _PROCESS,
        "tid": _THREAD,
        "args": args or {},
    }


def _counter(name: str, at: int, value: float) -> Event:
    return {"name": name, "ph": "C", "ts": at / 1e3, "pid": _PROCESS, "args": {"value": value}}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
