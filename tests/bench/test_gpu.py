"""bench/gpu walks every path without a GPU: on the fake one, with interpreted kernels, at tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def dry_run(file: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "bench/gpu", "--dry-run", "--json", str(file), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-4000:]
    return json.loads(file.read_text()), out.stdout


def test_the_loop_and_what_is_there_already(tmp_path: Path) -> None:
    """An empty loop takes as many turns as it is given; a second run adds nothing."""
    file = tmp_path / "results.json"
    found, _ = dry_run(file, "--only", "loop")
    # The fake's clock gives each kernel a millisecond: the end of the turn, and the condition.
    assert found["loop"]["empty loop"] == {"us_a_turn": 2000.0, "us_alone": 2000.0}
    assert found["loop"]["a block"]["graph_launches"] == 1
    assert found["machine"]["dry_run"] and "dry run" in found["machine"]["device"]
    found["loop"]["a block"]["wall_ms"] = -1.0
    file.write_text(json.dumps(found))
    again, _ = dry_run(file, "--only", "loop")
    assert again == found


@pytest.mark.slow
def test_every_part(tmp_path: Path) -> None:
    found, printed = dry_run(tmp_path / "results.json")
    kernels = found["kernels"]
    families = {name.split()[1] for name in kernels}
    assert families >= {"linear", "gated", "gate_up", "attend", "vocab_choice", "norm_rope_write"}
    assert families >= {"soft_embed", "route_limited", "route_grouped", "route_product", "advance"}
    assert all(r["right"] for r in kernels.values())
    assert found["quality"]["tokens"]["same"]
    steps = found["step"]
    for model in ("tiny LLaDA-MoE", "tiny LLaDA2", "tiny LLaDA"):
        mine = [name for name in steps if name.startswith(f"{model},")]
        assert any(name.endswith("eager") for name in mine)
        assert any(name.endswith("compile") for name in mine)
        assert all(steps[n]["launches_a_layer"] <= 10 for n in mine if "launches" in steps[n])
    assert any(name.endswith("4 experts") for name in steps)
    assert "a dry run, its times mean nothing" in printed


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, "bench/gpu", "--dry-run", "--only", "speed"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and "no part is called 'speed'" in out.stderr
