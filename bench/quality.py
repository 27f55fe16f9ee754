"""Every policy with every cache on held-out questions: accuracy, forwards, tokens a forward, rows.

    python bench/quality.py measure --model DIR --prompts FILE.jsonl --out FILE.json [--count N]
    python bench/quality.py show FILE.json... --out STEM

`measure` takes any Hugging Face folder and JSON lines with `prompt` and `answer`. The reference commits
one token a forward, without a cache. Accuracy, forwards and rows are the same on every machine; the
seconds are worth something only where nothing else runs. `show` writes STEM.txt, .png and .svg.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dcompile.driver import compile_checkpoint
from dcompile.options import Options
from dcompile.policies import find_policy
from dcompile.runtime.caches import cache_policy
from dcompile.runtime.loop import Result, Runner
from dcompile.runtime.state import Binding

CACHES: Mapping[str, Mapping[str, object]] = {
    "none": {"cache": "none"},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "vicinity 8/8": {"cache": "vicinity", "look_back": 8, "look_ahead": 8, "warmup": 1},
    "periodic 4": {"cache": "periodic", "refresh_every": 4},
    "active": {"cache": "active"},
}


@dataclass(frozen=True)
class Setting:
    """A policy and its run-time parameters."""

    policy: str
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join([self.policy, *(f"{value:g}" for value in self.parameters.values())])


@dataclass(frozen=True)
class Row:
    """What one setting with one cache came to, over all questions."""

    model: str
    policy: str
    cache: str
    right: int
    questions: int
    forwards: float
    """A question."""
    tokens_per_forward: float
    """Of those before the end."""
    rows: float
    """Positions computed a question."""
    agreement: float
    """Share of questions with the reference's tokens."""
    tokens_per_second: float


def settings(block: int) -> tuple[Setting, ...]:
    """The reference first; then each policy where it is used, around its paper's defaults."""
    return (
        Setting("steps", {"steps": block}),
        Setting("steps", {"steps": block // 2}),
        Setting("steps", {"steps": block // 4}),
        *(Setting("threshold", {"threshold": t}) for t in (0.5, 0.7, 0.8, 0.9, 0.95)),
        *(Setting("factor", {"factor": f}) for f in (1.0, 2.0)),
        Setting("hierarchical"),
        Setting("hierarchical", {"threshold": 0.8, "threshold_low": 0.5}),
        *(Setting("credit", {"threshold": t}) for t in (0.8, 0.9)),
        Setting("dynamic", {"threshold": 0.95, "steps": block}),
        Setting("edit"),
        Setting("remask"),
    )


def allowed(policy: str, cache: str) -> bool:
    """Whether the compiler takes the two together; a policy that edits needs every row of a block."""
    return not (cache == "active" and find_policy(policy).edits)


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


def measure(given: argparse.Namespace) -> Iterator[Row]:
    questions = read_questions(given.prompts, given.count)
    reference: list[list[int]] = []
    runners: dict[str, Runner] = {}
    with tempfile.TemporaryDirectory() as name:
        for setting in settings(given.block):
            if given.only and setting.policy not in given.only.split(","):
                continue
            if setting.policy not in runners:
                runners[setting.policy] = _compile(given, setting.policy, Path(name))
            runner = runners[setting.policy]
            for cache, options in CACHES.items():
                if not allowed(setting.policy, cache):
                    continue
                # The cache is the loop's choice of rows; the compiled step is the same.
                runner.cache = cache_policy(options, runner.limits.span)
                results, rows, seconds = _generate(runner, questions, setting, given.gen_length)
                tokens = [result.all_tokens for result in results]
                reference = reference or tokens
                yield _row(
                    (given.name, setting.label, cache),
                    (questions, results, reference),
                    rows,
                    seconds,
                )


def _compile(given: argparse.Namespace, policy: str, folder: Path) -> Runner:
    options = Options(
        max_length=given.max_length,
        batch=given.batch,
        block_length=given.block,
        policy=policy,
        cache="none",
    )
    return Runner.load(compile_checkpoint(given.model, options, folder / f"{policy}.dcx"))


def _generate(
    runner: Runner, questions: Sequence[Question], setting: Setting, gen_length: int
) -> tuple[list[Result], int, float]:
    watch = runner.watch = RowCount(runner)
    start = time.perf_counter()
    results = runner.generate(
        [question.prompt for question in questions], gen_length=gen_length, **setting.parameters
    )
    return results, watch.rows, time.perf_counter() - start


def _row(
    labels: tuple[str, str, str],
    found: tuple[Sequence[Question], Sequence[Result], Sequence[Sequence[int]]],
    rows: int,
    seconds: float,
) -> Row:
    questions, results, reference = found
    forwards, tokens = sum(r.forwards for r in results), sum(len(r.tokens) for r in results)
    answered = zip(questions, results, strict=True)
    same = zip(results, reference, strict=True)
    return Row(
        *labels,
        right=sum((r.text or "").strip() == q.answer for q, r in answered),
        questions=len(questions),
        forwards=forwards / len(questions),
        tokens_per_forward=tokens / forwards,
        rows=rows / len(questions),
        agreement=sum(r.all_tokens == wanted for r, wanted in same) / len(questions),
        tokens_per_second=tokens / seconds,
    )


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    p, whole = right / count, 1 + z * z / count
    middle = (p + z * z / (2 * count)) / whole
    half = z / whole * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def front(rows: Sequence[Row], cost: str) -> list[Row]:
    """The rows that none beats: fewer of `cost` and at least as many right, or as few and more."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (getattr(row, cost), -row.right)):
        if not best or row.right > best[-1].right:
            best.append(row)
    return best


def table(rows: Sequence[Row]) -> str:
    """Text, one part a model: the reference first, then by rows; * on the front, = in its interval."""
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        of_model = [row for row in rows if row.model == model]
        first, low = of_model[0], wilson(of_model[0].right, of_model[0].questions)[0]
        by_forwards, by_rows = front(of_model, "forwards"), front(of_model, "rows")
        lines = [
            f"{model}: {first.questions} questions; reference {first.policy}, {first.cache}: "
            f"{first.forwards:.2f} forwards and {first.rows:.0f} rows a question",
            f"{'policy':22}{'cache':14}{'right':>7}{'95 %':>15}{'NFE':>7}{'of ref':>8}{'TPF':>7}"
            f"{'rows':>7}{'of ref':>8}{'agree':>8}  front",
        ]
        for row in [first, *sorted(of_model[1:], key=lambda row: row.rows)]:
            share = row.right / row.questions
            lower, upper = wilson(row.right, row.questions)
            marks = "NFE " * (row in by_forwards) + "rows " * (row in by_rows)
            lines.append(
                f"{row.policy:22}{row.cache:14}{share:7.1%}{f'{lower:.1%} {upper:.1%}':>15}"
                f"{row.forwards:7.2f}{row.forwards / first.forwards:8.2f}"
                f"{row.tokens_per_forward:7.2f}{row.rows:7.0f}{row.rows / first.rows:8.2f}"
                f"{row.agreement:8.1%}{'  =' if share >= low else '   '} {marks}".rstrip()
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def picture(rows: Sequence[Row], stem: Path) -> None:
    """Accuracy against forwards and against rows, a row of panels a model, the fronts drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "dcompile"
    models = list(dict.fromkeys(row.model for row in rows))
    policies = list(dict.fromkeys(row.policy.split()[0] for row in rows))
    markers = dict(zip(CACHES, "osD^vP", strict=True))
    figure, panels = plt.subplots(len(models), 2, figsize=(13, 5 * len(models)), squeeze=False)
    for model, pair in zip(models, panels, strict=True):
        of_model = [row for row in rows if row.model == model]
        low, high = wilson(of_model[0].right, of_model[0].questions)
        for panel, cost in zip(pair, ("forwards", "rows"), strict=True):
            panel.axhspan(low, high, color="0.93", label="reference, 95 %")
            for row in of_model:
                panel.scatter(
                    getattr(row, cost),
                    row.right / row.questions,
                    marker=markers[row.cache],
                    color=f"C{policies.index(row.policy.split()[0])}",
                    s=28,
                    alpha=0.8,
                )
            best = front(of_model, cost)
            panel.plot(
                [getattr(row, cost) for row in best],
                [row.right / row.questions for row in best],
                color="0.3",
                linewidth=1,
                label="front",
            )
            panel.set(xscale="log", xlabel=f"{cost} a question", ylabel="exact match", title=model)
    kinds = [
        plt.Line2D([], [], linestyle="", marker="o", color=f"C{i}", label=policy)
        for i, policy in enumerate(policies)
    ]
    kinds += [
        plt.Line2D([], [], linestyle="", marker=mark, color="0.4", label=cache)
        for cache, mark in markers.items()
    ]
    figure.legend(handles=kinds, loc="lower center", ncols=7, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(stem.with_suffix(".png"), dpi=110, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("--model", type=Path, required=True)
    one.add_argument("--prompts", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--name", default="model")
    one.add_argument("--count", type=int)
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
        rows = [Row(**row) for file in given.files for row in json.loads(file.read_text())]
        given.out.with_suffix(".txt").write_text(table(rows))
        picture(rows, given.out)
        return
    found = []
    for row in measure(given):
        print(row, file=sys.stderr, flush=True)
        found.append(asdict(row))
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
