"""Runs each case in a forked child with limits on time and memory, so that no case can end the others."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

MEMORY = 512 << 20
"""What a case may take beside the size of its file."""


@dataclass(frozen=True)
class Outcome:
    """`kind` is what the case says it came to, or crash, hang, memory, traceback."""

    kind: str
    detail: str = ""
    seconds: float = 0.0  # of CPU
    memory: int = 0  # bytes of resident memory that the case added at its peak
    counts: dict[str, int] = field(default_factory=dict)  # of a case that was several

    @property
    def bad(self) -> bool:
        return self.kind in ("crash", "hang", "memory", "traceback", "failed", "other")

    def json(self) -> dict[str, Any]:
        return asdict(self)


def run_case(
    case: Callable[[], tuple[Any, ...]], seconds: float, size: int = 0, asleep: float = 30
) -> Outcome:
    """Fork; run the case within `seconds` of CPU and `size` + MEMORY more bytes; say what came of it.

    A child that waits for `asleep` seconds on end hangs; one that the machine gives no time does not.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(case, writer, seconds, size)
    os.close(writer)
    text = _read(reader, child, asleep)
    if text is None:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status, usage = os.wait4(child, 0)
    took = usage.ru_utime + usage.ru_stime
    if text is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        what = "it waits for something" if text is None else f"more than {seconds} s of CPU"
        return Outcome("hang", what, took)
    try:
        said = json.loads(text)
    except ValueError:
        what = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status}"
        return Outcome("crash", what, took)
    if said["memory"] > size + MEMORY:
        return Outcome(
            "memory", f"{said['memory'] >> 20} MiB more; {said['kind']}", took, said["memory"]
        )
    return Outcome(said["kind"], said["detail"], took, said["memory"], said["counts"])


def _child(case: Callable[[], tuple[Any, ...]], writer: int, seconds: float, size: int) -> None:
    gc.disable()
    soft = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _memory("VmSize") + size + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (before, before))
    resident = _memory("VmRSS")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    counts: dict[str, int] = {}
    try:
        kind, detail, *rest = case()
        counts = rest[0] if rest else {}
    except BaseException as error:  # whatever escapes is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = "memory" if isinstance(error, MemoryError) else "traceback"
        detail = f"{type(error).__name__}: {str(error)[:300]} at {where.filename}:{where.lineno}"
    peak = max(0, _memory("VmHWM") - resident)
    said = json.dumps({"kind": kind, "detail": detail[:2000], "memory": peak, "counts": counts})
    with contextlib.suppress(OSError):
        os.write(writer, said.encode())
    os._exit(0)


def _read(descriptor: int, child: int, asleep: float) -> str | None:
    """All that the child says; None where it waits too long for something else."""
    parts, awake = [], time.monotonic()
    while True:
        if not select.select([descriptor], [], [], 1.0)[0]:
            if _runs(child):
                awake = time.monotonic()
            elif time.monotonic() - awake > asleep:
                return None
            continue
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)


def _runs(process: int) -> bool:
    """Whether a process computes, or would if it were given a processor."""
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "R"


def _memory(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) << 10
    return 0
