"""The GPU suite: every kernel, whole steps, the loop on the device, and tokens, on one NVIDIA GPU.

    python bench/gpu                        everything, under 8 minutes on an H100 or H200
    python bench/gpu --only kernels,step    parts; what is in the results already is not run again
    python bench/gpu --dry-run              every path on the tests' fake GPU, at tiny shapes

Needs torch for CUDA, Triton and a GPU of sm_80, 86, 89, 90, 100 or 120; no network. Results go to
bench/results/DATE_gpu_DEVICE.json as they come, so that an interrupted run goes on where it stopped.

No figure has been taken yet: no GPU was at hand when this was written. `--dry-run` is a test.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1]
# The folder itself stands first when it is run; its parts are found as `gpu.NAME` only.
sys.path[:1] = [str(BENCH), str(BENCH.parent / "tests" / "support")]
PARTS = ("kernels", "step", "loop", "quality")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), metavar="kernels,step,loop,quality")
    parser.add_argument("--json", type=Path, help="where results go and are read from")
    parser.add_argument("--again", action="store_true", help="run what is there already once more")
    parser.add_argument("--dry-run", action="store_true", help="on the fake GPU, at tiny shapes")
    options = parser.parse_args()
    asked = [part.strip() for part in options.only.split(",") if part.strip()]
    if unknown := sorted(set(asked) - set(PARTS)):
        parser.error(f"no part is called {unknown[0]!r}: {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="dcompile-gpu-") as folder:
        machine = _machine(options.dry_run, Path(folder))
        file = options.json or _default_file(machine.facts["device"], options.dry_run, folder)
        results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        results["machine"] = machine.facts
        results["date"] = date.today().isoformat()
        for part in asked:
            _run(part, machine, results, file, options.again)
    wrong = [name for name, r in results.get("kernels", {}).items() if not r["right"]]
    if wrong or not results.get("quality", {}).get("tokens", {}).get("same", True):
        sys.exit(1)


def _machine(dry: bool, folder: Path) -> Any:
    if dry:
        import interpreter  # noqa: F401 - first of all: it makes this process interpret
    from gpu.machine import fake_machine, open_machine

    return fake_machine(folder) if dry else open_machine()


def _default_file(device: str, dry: bool, folder: str) -> Path:
    if dry:
        return Path(folder) / "dry.json"
    name = re.sub(r"\W+", "_", device).strip("_").lower()
    return BENCH / "results" / f"{date.today().isoformat()}_gpu_{name}.json"


def _run(part: str, machine: Any, results: dict[str, Any], file: Path, again: bool) -> None:
    """One part: each result is written when it is there."""
    import importlib

    module = importlib.import_module(f"gpu.{part}")
    done: dict[str, Any] = {} if again else results.get(part, {})
    results[part] = done
    began = time.perf_counter()
    for name, result in module.run(machine, dict(done)):
        done[name] = result
        file.write_text(json.dumps(results, indent=1) + "\n")
    took = time.perf_counter() - began
    print(f"{part}: {took:.0f} s on {machine.facts['device']}")
    print("\n".join(module.table(done)) + "\n")


if __name__ == "__main__":
    main()
