"""The fuzzer on a fixed seed, within a minute in all; and what it once found, run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOUND = sorted((Path(__file__).parents[1] / "fuzzed").glob("*.json"))


def fuzz(*arguments: str) -> dict[str, object]:
    command = [sys.executable, str(ROOT / "bench" / "fuzz"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout[done.stdout.index("{\n") :])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("subject", "count", "kinds"),
    [
        ("programs", 2, {"passed"}),
        ("damage", 80, {"named", "equal"}),
        ("commands", 30, {"done", "named", "usage"}),
    ],
)
def test_nothing_breaks(subject: str, count: int, kinds: set[str], tmp_path: Path) -> None:
    found = [str(path) for path in FOUND if json.loads(path.read_text())["subject"] == subject]
    assert found
    limits = ["--seed", "7", "--count", str(count), "--seconds", "240"]
    report = fuzz(subject, *limits, "--failures", str(tmp_path), "--replay", *found)
    assert report["failures"] == [] and kinds <= set(report["total"])  # type: ignore[call-overload]
