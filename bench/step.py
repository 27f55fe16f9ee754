"""One forward of the mid model: plain full, eager windowed, torch.compile of it, the artifact; in turn.

python bench/step.py [--model mid|wide] [--dtype bfloat16] [--window 32] [--context 192] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import models
import torch

from dcompile.bench import bench
from dcompile.driver import compile_checkpoint
from dcompile.options import Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["mid", "wide"], default="mid")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--against", default="full,eager,compile")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sizes = {"mid": models.MID, "wide": models.WIDE}[given.model]
    with tempfile.TemporaryDirectory(prefix="dcompile-bench-") as name:
        folder = Path(name)
        checkpoint = models.write(folder / "model", sizes, getattr(torch, given.dtype))
        options = Options(
            max_length=given.context, block_length=given.window, cache="dual", threads=given.threads
        )
        artifact = compile_checkpoint(checkpoint, options, folder / "model.dcx")
        table = bench(
            artifact,
            [r for r in given.against.split(",") if r],
            checkpoint,
            rounds=given.rounds,
            threads=given.threads,
        )
    print(
        f"{given.model} model, torch {torch.__version__}, {platform.processor() or platform.machine()}"
    )
    print(table.text())
    if given.json:
        given.json.write_text(json.dumps({"model": given.model, **table.json()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
