"""kill -9 in the middle of a compile: the old artifact must be whole, and the next compile must work.

    python bench/kill_compile.py [--kills 20] [--seed N] [--json FILE]

A compile of another maximum length over an old artifact is killed again and again, most times while it writes:
once its temporary file is there, after a random share of the time that writing takes. Folders and files take
turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from checkpoints import write_checkpoint

from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.loop import Runner

SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "moe_layer_freq": [1, 1],
    "expert_intermediate_size": 1024,
}


def start(checkpoint: Path, out: Path, length: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dcompile", "compile", str(checkpoint), "-o", str(out), "-q"]
    return subprocess.Popen([*command, "--max-length", str(length), "--block-length", "8"])


def writes(out: Path) -> bool:
    """Whether somebody is writing the artifact now."""
    return any(out.parent.glob(f".{out.name}.*.tmp"))


def digest(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        if file.is_file():
            total.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return total.hexdigest()


def timed(checkpoint: Path, out: Path, length: int) -> tuple[float, float]:
    """Compile whole; seconds until it writes, and while it writes."""
    began, first = time.monotonic(), 0.0
    process = start(checkpoint, out, length)
    while process.poll() is None:
        if not first and writes(out):
            first = time.monotonic()
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"the compile failed with {process.returncode}")
    return first - began, time.monotonic() - first


def kill(
    checkpoint: Path, out: Path, before: float, writing: float, rng: random.Random, anywhere: bool
) -> str:
    """Start a compile and kill it; in which phase it was: before, writing, done."""
    process = start(checkpoint, out, 96)
    if anywhere:
        time.sleep(rng.uniform(0, before + writing))
    else:
        while not writes(out) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, writing * 0.95))
    process.send_signal(signal.SIGKILL)
    phase = "done" if process.wait() == 0 else "writing" if writes(out) else "before"
    return phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    root = Path(tempfile.mkdtemp())
    try:
        checkpoint = write_checkpoint(root / "checkpoint", "llada_moe", **SIZES)
        report = run(checkpoint, root, given.kills, rng)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(report, indent=1))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    if report["broken"]:
        raise SystemExit(1)


def run(checkpoint: Path, root: Path, kills: int, rng: random.Random) -> dict[str, object]:
    times, old, phases, broken = {}, {}, [], []
    outs = [root / "model.dcx", root / "model"]
    for out in outs:
        times[out] = timed(checkpoint, out, 64)
        old[out] = digest(out)
    for number in range(kills):
        out = outs[number % 2]
        phase = kill(checkpoint, out, *times[out], rng, anywhere=number % 5 == 4)
        phases.append(phase)
        if phase == "done":
            start(checkpoint, out, 64).wait()
        elif digest(out) != old[out]:
            broken.append(f"kill {number} ({phase}): {out.name} is not what it was")
        open_artifact(out)
        print(f"{number + 1}: killed {phase} {out.name}", file=sys.stderr, flush=True)
    for out in outs:
        if start(checkpoint, out, 96).wait() or digest(out) == old[out]:
            broken.append(f"the compile after all of them failed: {out.name}")
        if writes(out):
            broken.append(f"what was killed is still there: {out.name}")
        Runner.load(out).generate([[1, 2, 3]], gen_length=8)
    size = outs[0].stat().st_size >> 20
    return {
        "kills": kills,
        "phases": {phase: phases.count(phase) for phase in sorted(set(phases))},
        "artifact_mib": size,
        "seconds_before_and_while_writing": [[round(s, 2) for s in times[o]] for o in outs],
        "broken": broken,
    }


if __name__ == "__main__":
    main()
