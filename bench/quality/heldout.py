"""The shipped model's held-out set through each cache: accuracy, forwards, tokens a forward, agreement.

    python bench/quality/heldout.py [--json FILE] [--count N] [--block 16]

The reference is the plain model decoded without a cache (`dcompile/step/plain_decode.py`), a prompt at
a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from dcompile.demo import GEN_LENGTH, MAX_LENGTH, MODEL, heldout
from dcompile.driver.compile import compile_checkpoint
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner
from dcompile.step.plain_decode import plain_decode

CACHES = ("none", "prefix", "dual", "vicinity", "periodic")


def measure(count: int | None, block: int, threshold: float) -> list[dict[str, object]]:
    """One row for the reference, one for each cache at batch 1, and for `none` at batch 3 and 8."""
    examples = heldout()[:count]
    checkpoint = open_checkpoint(MODEL)
    model, spec = checkpoint.reference(), checkpoint.spec
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        made = {}
        for cache in CACHES:
            options = Options(max_length=MAX_LENGTH, batch=8, block_length=block, cache=cache)
            made[cache] = compile_checkpoint(MODEL, options, Path(name) / f"{cache}.dcx")
        runners = {cache: Runner.load(path) for cache, path in made.items()}
        tokenizer = runners["none"].tokenizer
        prompts = [tokenizer.encode(e.prompt, False) for e in examples]
        start = time.perf_counter()
        reference = [
            plain_decode(model, spec, ids, GEN_LENGTH, block, threshold=threshold)
            for ids in prompts
        ]
        seconds = time.perf_counter() - start
        wanted = [r.tokens for r in reference]

        def row(label: str, tokens: list[list[int]], forwards: list[int], took: float) -> None:
            kept = [_before_end(t, spec.eos_ids) for t in tokens]
            texts = [tokenizer.decode(t).strip() for t in kept]
            right = sum(t == e.answer for t, e in zip(texts, examples, strict=True))
            rows.append(
                {
                    "run": label,
                    "accuracy": right / len(examples),
                    "forwards": sum(forwards) / len(forwards),
                    "tokens_per_forward": sum(map(len, kept)) / sum(forwards),
                    "same_tokens": sum(a == b for a, b in zip(tokens, wanted, strict=True)),
                    "prompts": len(examples),
                    "seconds": took,
                    "tokens_per_second": sum(map(len, kept)) / took,
                }
            )

        row("plain, uncached", wanted, [r.forwards for r in reference], seconds)
        for label, cache, batch in [
            *((f"{c}, batch 1", c, 1) for c in CACHES),
            ("none, batch 3", "none", 3),
            ("none, batch 8", "none", 8),
            ("dual, batch 8", "dual", 8),
        ]:
            start = time.perf_counter()
            results = []
            for i in range(0, len(prompts), batch):
                part = prompts[i : i + batch]
                results += runners[cache].generate(part, gen_length=GEN_LENGTH, threshold=threshold)
            took = time.perf_counter() - start
            row(label, [list(r.all_tokens) for r in results], [r.forwards for r in results], took)
    return rows


def _before_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    at = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
    return tokens[:at]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.count, given.block, given.threshold)
    print(f"{'':18}{'accuracy':>9}{'NFE':>8}{'TPF':>7}{'same':>11}{'tok/s':>9}{'x':>7}")
    base = float(rows[0]["seconds"])  # type: ignore[arg-type]
    for r in rows:
        same = f"{r['same_tokens']}/{r['prompts']}"
        print(
            f"{r['run']:18}{r['accuracy']:9.3f}{r['forwards']:8.2f}{r['tokens_per_forward']:7.2f}"
            f"{same:>11}{r['tokens_per_second']:9.0f}{base / float(r['seconds']):7.1f}"  # type: ignore[arg-type]
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
