"""One forward beside its rivals and the floor, in turn: artifact, eager and torch.compile with the same cache.

python bench/speed/step.py --keep DIR --prepare        # writes checkpoints and artifacts, to time them later
python bench/speed/step.py --keep DIR [--model mid|wide] [--dtypes bfloat16] [--windows 8 32 64] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from itertools import product
from pathlib import Path

import models
import torch

from dcompile.bench.command import Table, bench
from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options


def checkpoint_of(folder: Path, model: str, dtype: str) -> Path:
    path = folder / f"{model}_{dtype}"
    if not path.exists():
        sizes = {"mid": models.MID, "wide": models.WIDE}[model]
        models.write(path, sizes, getattr(torch, dtype))
    return path


def artifact_of(folder: Path, model: str, dtype: str, window: int, context: int) -> Path:
    path = folder / f"{model}_{dtype}_{window}_{context}.dcx"
    if not path.exists():
        options = Options(max_length=context, block_length=window, cache="dual")
        compile_checkpoint(checkpoint_of(folder, model, dtype), options, path)
    return path


def summary(model: str, tables: list[Table]) -> str:
    """One line a configuration: the artifact's milliseconds, over the floor, and the rivals over it."""
    rivals = [r.name for r in tables[0].rows if r.name != "artifact"]
    heads = "".join(f"{'x ' + name:>11}" for name in rivals)
    lines = [f"{model:6}{'dtype':>9}{'window':>8}{'threads':>9}{'ms':>9}{'x floor':>9}{heads}"]
    for t in tables:
        ours = next(r for r in t.rows if r.name == "artifact").median
        others = "".join(f"{r.ratio(ours):11.2f}" for r in t.rows if r.name != "artifact")
        where = f"{'':6}{t.dtype:>9}{t.window:8}{t.threads:9}"
        lines.append(f"{where}{ours:9.1f}{ours / t.floor:9.2f}{others}")
    return "\n".join(lines)


def run(folder: Path, given: argparse.Namespace) -> list[Table]:
    tables = []
    cases = product(given.dtypes, given.windows, given.threads)
    for dtype, window, threads in cases:
        artifact = artifact_of(folder, given.model, dtype, window, given.context)
        if given.prepare:
            continue
        rivals = [r for r in given.against.split(",") if r]
        checkpoint = checkpoint_of(folder, given.model, dtype)
        tables.append(bench(artifact, rivals, checkpoint, rounds=given.rounds, threads=threads))
        print(tables[-1].text(), flush=True)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["mid", "wide"], default="mid")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--windows", type=int, nargs="+", default=[32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--against", default="eager,compile", help="full, plain as well")
    parser.add_argument("--keep", type=Path, help="where checkpoints and artifacts stay")
    parser.add_argument("--prepare", action="store_true", help="write them, time nothing")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dcompile-bench-") as name:
        folder = given.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        tables = run(folder, given)
    if not tables:
        return
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}")
    print(summary(given.model, tables))
    if given.json:
        rows = [t.json() for t in tables]
        given.json.write_text(json.dumps({"model": given.model, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
