"""Every policy with every cache on held-out questions: accuracy, forwards, tokens a forward, rows.

    python bench/quality/policies.py measure --model DIR --prompts FILE.jsonl --out FILE.json [--minutes 10]
    python bench/quality/policies.py show FILE.json... --out STEM

`measure` takes any Hugging Face folder and JSON lines with `prompt` and `answer`. The reference commits
one token a forward, without a cache. What FILE.json has is not measured again, so a run that was cut
or ran out of its minutes goes on where it was. Accuracy, forwards and rows are the same on every
machine; the seconds are worth something only where nothing else runs. `show` writes STEM.txt, .png
and .svg: tables, what is chosen by the even questions and what the odd ones say to it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from picture import picture
from table import Row, table

from dcompile.decoding.rules import Combination, refused
from dcompile.driver.compile import compile_checkpoint
from dcompile.frontends.base import ModelSpec
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.policies import find_policy
from dcompile.runtime.decode.caches import cache_policy
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result
from dcompile.runtime.state import Binding

CACHES: Mapping[str, Mapping[str, object]] = {
    "none": {"cache": "none"},
    "dual": {"cache": "dual"},
    "active": {"cache": "active"},
    "vicinity 8/8": {"cache": "vicinity", "look_back": 8, "look_ahead": 8, "warmup": 1},
    "periodic 4": {"cache": "periodic", "refresh_every": 4},
    "prefix": {"cache": "prefix"},
    "block": {"cache": "block"},
}


@dataclass(frozen=True)
class Setting:
    """A policy with its run-time parameters, and how it is driven."""

    policy: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    manager: str = "blockwise"
    smoothing: float | None = None

    @property
    def label(self) -> str:
        parts = [self.policy, *(f"{value:g}" for value in self.parameters.values())]
        return " ".join([*parts, *(["smoothed"] if self.smoothing else [])])

    @property
    def caches(self) -> Mapping[str, Mapping[str, object]]:
        """Of the canvas, which has one block and takes many forwards, only some."""
        if self.manager == "blockwise":
            return CACHES
        return {name: CACHES[name] for name in ("none", "active", "vicinity 8/8", "block")}

    def with_cache(self, cache: str, spec: ModelSpec) -> Combination:
        policy, smoothing = find_policy(self.policy), self.smoothing is not None
        return Combination(
            policy, self.manager, cache, spec.block_length, smoothing, shift=spec.shift
        )


def settings(block: int, gen_length: int) -> tuple[Setting, ...]:
    """The reference first; then each policy around its paper's defaults."""
    return (
        Setting("steps", {"steps": block}),
        *(Setting("threshold", {"threshold": t}) for t in (0.9, 0.8, 0.7, 0.5, 0.95)),
        *(Setting("factor", {"factor": f}) for f in (1.0, 0.5, 2.0)),
        Setting("hierarchical", {"threshold": 0.92, "threshold_low": 0.62}),
        Setting("hierarchical", {"threshold": 0.8, "threshold_low": 0.5}),
        *(Setting("credit", {"threshold": t}) for t in (0.9, 0.8, 0.7)),
        *(Setting("threshold", {"threshold": t}, smoothing=0.3) for t in (0.9, 0.8, 0.7)),
        *(Setting("dynamic", {"threshold": t, "steps": block}) for t in (0.95, 0.85)),
        Setting("edit", {"threshold": 0.7, "threshold_edit": 0.5}),
        Setting("edit", {"threshold": 0.9, "threshold_edit": 0.9}),
        Setting("remask", {"threshold": 0.9, "threshold_remask": 0.4}),
        *(Setting("steps", {"steps": block // part}) for part in (2, 4)),
        *(
            Setting(policy, {"steps": gen_length // part}, "canvas")
            for policy in ("entropy", "margin", "maskgit_plus")
            for part in (1, 2, 4)
        ),
        *(Setting("threshold", {"threshold": t}, "canvas") for t in (0.9, 0.8)),
    )


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str


def read_questions(path: Path, count: int | None) -> list[Question]:
    """So many questions, evenly out of the file."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    every = max(1, len(lines) // count) if count else 1
    return [Question(line["prompt"], line["answer"]) for line in lines[::every][:count]]


class RowCount:
    """Watches a generation and counts the rows that it computes."""

    def __init__(self, runner: Runner) -> None:
        self.rows, self._runner = 0, runner

    def launch(self, binding: Binding, prompts: Mapping[int, int]) -> None:
        self.rows += binding.R
        self._runner.executor.launch(binding)


def measure(given: argparse.Namespace, done: Sequence[Row]) -> Iterator[Row]:
    """Rows that are not done yet, until the minutes are over."""
    questions, began = read_questions(given.prompts, given.count), time.monotonic()
    spec = open_checkpoint(given.model).spec
    runners: dict[object, Runner] = {}
    known = {row.setting for row in done}
    reference = list(done[0].texts) if done else []
    with tempfile.TemporaryDirectory() as name:
        for setting in settings(given.block, given.gen_length):
            if given.only and setting.policy not in given.only.split(","):
                continue
            for cache, options in setting.caches.items():
                if (setting.label, setting.manager, cache) in known:
                    continue
                if refused(setting.with_cache(str(options["cache"]), spec)):
                    continue
                if time.monotonic() - began > 60 * given.minutes:
                    return
                compiled = (setting.policy, setting.manager, setting.smoothing)
                if compiled not in runners:
                    runners[compiled] = _compile(given, setting, Path(name))
                runner = runners[compiled]
                # The cache is the loop's choice of rows; the compiled step is the same.
                runner.cache = cache_policy(options, runner.limits.span)
                watch = runner.watch = RowCount(runner)
                start = time.perf_counter()
                results = runner.generate(
                    [question.prompt for question in questions],
                    gen_length=given.gen_length,
                    **setting.parameters,
                )
                seconds = time.perf_counter() - start
                labels = (given.name, setting.label, setting.manager, cache)
                row = _row(labels, questions, results, reference)
                reference = reference or list(row.texts)
                yield replace(row, rows=watch.rows, seconds=round(seconds, 2))


def _compile(given: argparse.Namespace, setting: Setting, folder: Path) -> Runner:
    options = Options(
        max_length=given.max_length,
        batch=given.batch,
        block_length=given.gen_length if setting.manager == "canvas" else given.block,
        policy=setting.policy,
        manager=setting.manager,
        cache="none",
        smoothing=setting.smoothing,
    )
    out = folder / f"{setting.policy}_{setting.manager}_{setting.smoothing}.dcx"
    return Runner.load(compile_checkpoint(given.model, options, out))


def _row(
    labels: tuple[str, str, str, str],
    questions: Sequence[Question],
    results: Sequence[Result],
    reference: Sequence[str],
) -> Row:
    texts = [(result.text or "").strip() for result in results]
    right = zip(texts, questions, strict=True)
    same = zip(texts, reference or texts, strict=True)
    return Row(
        *labels,
        hits="".join("01"[text == question.answer] for text, question in right),
        same="".join("01"[text == wanted] for text, wanted in same),
        forwards=tuple(result.forwards for result in results),
        tokens=tuple(len(result.tokens) for result in results),
        texts=() if reference else tuple(texts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("--model", type=Path, required=True)
    one.add_argument("--prompts", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--name", default="model")
    one.add_argument("--count", type=int)
    one.add_argument("--minutes", type=float, default=1e9)
    one.add_argument("--block", type=int, default=16)
    one.add_argument("--gen-length", type=int, default=32)
    one.add_argument("--max-length", type=int, default=128)
    one.add_argument("--batch", type=int, default=16)
    one.add_argument("--only", help="policies, separated by commas")
    many = commands.add_parser("show")
    many.add_argument("files", type=Path, nargs="+")
    many.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "show":
        rows = [row for file in given.files for row in Row.read(file)]
        given.out.with_suffix(".txt").write_text(table(rows))
        picture(rows, given.out)
        return
    found = Row.read(given.out) if given.out.exists() else []
    for row in measure(given, found):
        print(row.summary(), file=sys.stderr, flush=True)
        found.append(row)
        given.out.write_text(Row.written(found))


if __name__ == "__main__":
    main()
