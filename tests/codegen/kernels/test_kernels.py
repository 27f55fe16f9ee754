"""Runs the tests of `interpreted/` in a process where Triton interprets kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_every_family_interpreted_against_float64() -> None:
    """TRITON_INTERPRET decides at import what a kernel is, so it must not reach this process."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).parent / "interpreted")],
        env=env,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-2000:]
