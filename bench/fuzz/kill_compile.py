"""kill -9 in the middle of a compile: the old artifact must be whole, and the next compile must work.

    python bench/fuzz/kill_compile.py [--kills 20] [--seed N] [--json FILE]

A compile of another maximum length over an old artifact is killed again and again: three of four times while it
writes, after a random number of bytes, else at a random time. Folders and files take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from checkpoints import write_checkpoint

from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options
from dcompile.runtime import writing
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.decode.loop import Runner

SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "moe_layer_freq": [1, 1],
    "expert_intermediate_size": 512,
}


class Compile:
    """A compile in a forked child: the whole of it, but for the start of Python."""

    def __init__(self, checkpoint: Path, out: Path, length: int, ends_at: int = -1) -> None:
        """With `ends_at` it is killed once it has written so many bytes, or when all is written."""
        self.status: int | None = None
        self.process = os.fork()
        if self.process == 0:
            code = 1
            if ends_at >= 0:
                _end_at(ends_at)
            try:
                compile_checkpoint(checkpoint, Options(max_length=length, block_length=8), out)
                code = 0
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.status is None:
            found, status = os.waitpid(self.process, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if found else None
        return self.status

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.001)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.process, signal.SIGKILL)


def _end_at(most: int) -> None:
    """Let this process kill itself, -9, in the write that passes `most` bytes, or before the last rename."""
    write, written = writing.ArtifactWriter._write, [0]

    def counted(self: Any, name: str, pieces: list[memoryview]) -> str:
        def cut() -> Iterator[memoryview]:
            for piece in pieces:
                for at in range(0, piece.nbytes, 1 << 14):
                    if written[0] >= most:
                        os.kill(os.getpid(), signal.SIGKILL)
                    part = piece[at : at + (1 << 14)]
                    written[0] += part.nbytes
                    yield part

        done: str = write(self, name, cut())  # type: ignore[arg-type]
        if name == "manifest.json":
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    writing.ArtifactWriter._write = counted  # type: ignore[method-assign]


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


def timed(checkpoint: Path, out: Path, length: int) -> float:
    """Compile whole; the seconds that it takes."""
    began = time.monotonic()
    if status := Compile(checkpoint, out, length).wait():
        raise SystemExit(f"the compile failed with {status}")
    return time.monotonic() - began


def kill(
    checkpoint: Path, out: Path, whole: float, size: int, rng: random.Random, anywhere: bool
) -> str:
    """Start a compile and kill it; in which phase it was: before, writing, done."""
    if anywhere:
        process = Compile(checkpoint, out, 96)
        time.sleep(rng.uniform(0, whole))
        process.kill()
    else:
        process = Compile(checkpoint, out, 96, ends_at=rng.randrange(size))
    return "done" if process.wait() == 0 else "writing" if writes(out) else "before"


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
        size = sum(f.stat().st_size for f in [out, *out.rglob("*")] if f.is_file())
        phase = kill(checkpoint, out, times[out], size, rng, anywhere=number % 4 == 3)
        phases.append(phase)
        if phase == "done":
            Compile(checkpoint, out, 64).wait()
        elif digest(out) != old[out]:
            broken.append(f"kill {number} ({phase}): {out.name} is not what it was")
        open_artifact(out)
        print(f"{number + 1}: killed {phase} {out.name}", file=sys.stderr, flush=True)
    for out in outs:
        if Compile(checkpoint, out, 96).wait() or digest(out) == old[out]:
            broken.append(f"the compile after all of them failed: {out.name}")
        if writes(out):
            broken.append(f"what was killed is still there: {out.name}")
        Runner.load(out).generate([[1, 2, 3]], gen_length=8)
    size = outs[0].stat().st_size >> 20
    return {
        "kills": kills,
        "phases": {phase: phases.count(phase) for phase in sorted(set(phases))},
        "artifact_mib": size,
        "seconds": [round(times[out], 2) for out in outs],
        "broken": broken,
    }


if __name__ == "__main__":
    main()
