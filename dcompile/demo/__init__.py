"""The small trained model that ships with the package: compiled, run, and measured against itself plain."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from dcompile.driver.compile import compile_checkpoint
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result
from dcompile.step.plain_decode import plain_decode

HERE = Path(__file__).parent
MODEL = HERE / "model"
GEN_LENGTH, BLOCK, MAX_LENGTH, BATCH = 32, 16, 128, 8


@dataclass(frozen=True)
class Example:
    task: str
    prompt: str
    answer: str


def heldout() -> list[Example]:
    """Prompts and answers that the model was not trained on."""
    lines = (HERE / "heldout.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [Example(r["task"], r["prompt"], r["answer"]) for r in rows]


def run_demo(count: int = 24) -> None:
    """Compile, generate, and print what was gained against the plain model, on standard output."""
    examples = heldout()
    chosen = examples[:: max(1, len(examples) // count)][:count]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dcompile-demo-") as folder:
        start = time.perf_counter()
        options = Options(max_length=MAX_LENGTH, batch=BATCH, block_length=BLOCK, cache="dual")
        artifact = compile_checkpoint(MODEL, options, Path(folder) / "demo.dcx")
        took = time.perf_counter() - start
        size = artifact.stat().st_size / 1e6
        typer.echo(f"compiled the shipped model in {took:.1f} s: {size:.1f} MB for the CPU\n")
        runner = Runner.load(artifact)
        prompts = [e.prompt for e in chosen]
        runner.generate(prompts[:1], gen_length=GEN_LENGTH)
        start = time.perf_counter()
        alone = [runner.generate([p], gen_length=GEN_LENGTH)[0] for p in prompts]
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        runner.generate(prompts, gen_length=GEN_LENGTH)
        batched = time.perf_counter() - start
    _print_answers(chosen, alone)
    _print_gain(chosen, alone, seconds, batched)


def _print_answers(chosen: list[Example], results: list[Result]) -> None:
    for example, result in list(zip(chosen, results, strict=True))[::3]:
        mark = "right" if _text(result) == example.answer else f"not {example.answer!r}"
        typer.echo(f"  {example.prompt.strip()!r:56} {_text(result)!r:28} {mark}")


def _print_gain(
    chosen: list[Example], results: list[Result], seconds: float, batched: float
) -> None:
    checkpoint = open_checkpoint(MODEL)
    model, spec = checkpoint.reference(), checkpoint.spec
    prompts = _prompt_ids(chosen)
    start = time.perf_counter()
    threshold = spec.defaults.parameters("threshold")["threshold"]
    plain = [
        plain_decode(model, spec, ids, GEN_LENGTH, BLOCK, threshold=threshold) for ids in prompts
    ]
    plain_seconds = time.perf_counter() - start
    right = sum(_text(r) == e.answer for e, r in zip(chosen, results, strict=True))
    same = sum(list(r.all_tokens) == p.tokens for r, p in zip(results, plain, strict=True))
    tokens = sum(len(r.tokens) for r in results)
    forwards, plain_forwards = sum(r.forwards for r in results), sum(p.forwards for p in plain)
    typer.echo(
        f"\n{len(chosen)} prompts, {tokens} tokens before the end, one thread, dual cache, blocks of "
        f"{BLOCK}: {right} right\n"
        f"  plain model       {plain_seconds:7.2f} s   {plain_forwards:4} forwards\n"
        f"  artifact          {seconds:7.2f} s   {forwards:4} forwards   "
        f"{plain_seconds / seconds:5.1f} x faster, {same} of {len(chosen)} answers token-identical\n"
        f"  artifact, batch {BATCH} {batched:7.2f} s                   "
        f"{plain_seconds / batched:5.1f} x faster"
    )


def _text(result: Result) -> str:
    return (result.text or "").strip()


def _prompt_ids(chosen: list[Example]) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return [tokenizer.encode(e.prompt, add_special_tokens=False).ids for e in chosen]
