"""bench/README.md names every script."""

from __future__ import annotations

import re
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_every_script_is_listed_and_every_listed_script_is_there() -> None:
    scripts = {
        path.parent if path.name == "__main__.py" else path
        for path in BENCH.rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    rows = re.findall(r"^\| `([\w/.]+)` \|", (BENCH / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(path.relative_to(BENCH).as_posix() for path in scripts)
