"""What limits on routing buy and cost: accuracy, load of the experts, experts touched, bytes, time.

    python bench/quality/moe.py [--count 64] [--rounds 3] [--json FILE]

The shipped model answers held-out questions (block 8, dual cache); then a random mixture whose router
prefers few experts (64 experts, top 8, a bias of -log(rank)) generates, and "accuracy" is the share of
tokens that equal the unlimited ones.  Load is tokens an expert gets in one layer of one iteration (of the
random model: of those over a block only), largest and mean over the experts, averaged; bytes are those of
the experts touched; the time is the routing and `moe_ffn` launches of a generation, median of the rounds,
in turn with the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcompile.cost.launches import chosen_experts
from dcompile.demo import GEN_LENGTH, MAX_LENGTH, MODEL, heldout
from dcompile.driver.compile import compile_checkpoint, compile_module
from dcompile.options import Options
from dcompile.profile.watch import Observer, Timer
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result

Limits = Mapping[str, object]
DROP, REROUTE = "drop", "reroute"


def settings(pools: Sequence[int]) -> dict[str, Limits]:
    out: dict[str, Limits] = {"unlimited": {}}
    for gamma in (1.0, 1.5, 2.0):
        for how in (DROP, REROUTE):
            out[f"capacity {gamma:g} {how}"] = {"moe_capacity": gamma, "moe_overflow": how}
    return out | {f"pool {pool}": {"expert_pool": pool} for pool in pools}


@dataclass(frozen=True)
class Row:
    """One setting; per layer and iteration where not said otherwise."""

    model: str
    limits: str
    accuracy: float
    forwards: float  # a prompt
    largest: float  # tokens of the busiest expert
    mean: float  # tokens an expert
    touched: float  # experts
    touched_by_layer: list[float]
    megabytes: float  # of their weights
    lost: float  # share of the tokens' choices that none took
    microseconds: float  # routing and moe_ffn, a launch pair


class Skewed(nn.Module):
    """Layers of experts whose router likes the first ones, with a residual and no attention."""

    def __init__(
        self, hidden: int = 512, inner: int = 256, experts: int = 64, top: int = 8
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.top = top
        self.embed = nn.Embedding(512, hidden)
        self.gates = nn.ModuleList(nn.Linear(hidden, experts) for _ in range(4))
        for gate in self.gates:
            nn.init.normal_(gate.weight, std=hidden**-0.5)
            rank = torch.randperm(experts) + 1
            gate.bias.data = -torch.log(rank.float())

        def weights(out: int, into: int) -> nn.ParameterList:
            made = (torch.randn(experts, out, into) * into**-0.5 for _ in self.gates)
            return nn.ParameterList(made)

        self.gate, self.up = weights(inner, hidden), weights(inner, hidden)
        self.down = weights(hidden, inner)
        self.head = nn.Linear(hidden, 512, bias=False)
        nn.init.normal_(self.head.weight, std=0.05)  # unsure, so that a block takes iterations
        self.place = nn.Embedding(192, hidden)  # else all masks would be alike

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for layer, router in enumerate(self.gates):
            h = F.rms_norm(x, (x.shape[-1],))
            scores = router(h).softmax(-1)
            weights, chosen = scores.topk(self.top, -1)
            by = torch.zeros_like(scores).scatter(-1, chosen, weights)
            act = F.silu(torch.einsum("btd,efd->btef", h, self.gate[layer]))
            act = act * torch.einsum("btd,efd->btef", h, self.up[layer])
            x = x + torch.einsum("btef,edf,bte->btd", act, self.down[layer], by)
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """A model, its prompts, and how its answers are judged."""

    name: str
    prompts: list[object]
    gen_length: int
    window: int  # iterations over more rows are not counted
    runners: dict[str, Runner]
    answers: list[str] | None  # None: the unlimited run's tokens

    def generate(self, runner: Runner) -> list[Result]:
        out = []
        for prompt in self.prompts:
            out += runner.generate([prompt], gen_length=self.gen_length, threshold=0.9)  # type: ignore
        return out


def look(case: Case, runner: Runner) -> tuple[list[np.ndarray], list[int], int]:
    """Experts chosen [rows, k] by iteration and layer; the layers; how many experts there are."""
    plan = runner.executor.plan
    found = {i: chosen_experts(launch) for i, launch in enumerate(plan.text["launches"])}
    probes = {i: buffer for i, buffer in found.items() if buffer is not None}
    first = plan.text["launches"][min(probes)]["args"][2]["b"]
    experts = int(plan.text["buffers"][first]["shape"][-1])
    runner.watch = observer = Observer(runner.executor, probes)
    case.generate(runner)
    runner.watch = None
    kept = [s for s in observer.iterations if case.window >= s.R]
    order = sorted(probes)
    return [s.probes[i] for s in kept for i in order], list(range(len(order))) * len(kept), experts


def time_of(case: Case, runner: Runner) -> float:
    """Microseconds of a router and its moe_ffn, over the counted iterations of a generation."""
    kernels = [launch.kernel for launch in runner.executor.plan.launches]
    mine = [i for i, k in enumerate(kernels) if k.startswith(("route", "moe_ffn"))]
    runner.watch = timer = Timer(runner.executor)
    case.generate(runner)
    runner.watch = None
    each = [t.seconds[mine].sum() for t in timer.iterations if case.window >= t.R]
    return 1e6 * float(np.mean(each)) / (len(mine) / 2)


def measure(case: Case, rounds: int, expert_bytes: int) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in case.runners}
    for _ in range(rounds):
        for name, runner in case.runners.items():
            times[name].append(time_of(case, runner))
    rows = []
    wanted = [list(r.all_tokens) for r in case.generate(case.runners["unlimited"])]
    for name, runner in case.runners.items():
        results = case.generate(runner)
        chosen, layers, experts = look(case, runner)
        loads = [np.bincount(c[c >= 0].ravel(), minlength=experts) for c in chosen]
        touched = [int((load > 0).sum()) for load in loads]
        by_layer = [
            statistics.fmean(t for t, at in zip(touched, layers, strict=True) if at == layer)
            for layer in sorted(set(layers))
        ]
        rows.append(
            Row(
                case.name,
                name,
                accuracy(case, results, wanted),
                statistics.fmean(r.forwards for r in results),
                statistics.fmean(int(load.max()) for load in loads),
                statistics.fmean(float(load.mean()) for load in loads),
                statistics.fmean(touched),
                [round(t, 2) for t in by_layer],
                statistics.fmean(touched) * expert_bytes / 1e6,
                statistics.fmean(float((c < 0).mean()) for c in chosen),
                statistics.median(times[name]),
            )
        )
    return rows


def accuracy(case: Case, results: Sequence[Result], wanted: Sequence[list[int]]) -> float:
    if case.answers is not None:
        right = [(r.text or "").strip() == a for r, a in zip(results, case.answers, strict=True)]
        return statistics.fmean(right)
    same = [
        a == b
        for r, tokens in zip(results, wanted, strict=True)
        for a, b in zip(r.all_tokens, tokens, strict=True)
    ]
    return statistics.fmean(same)


def shipped(count: int, folder: Path) -> Case:
    chosen = heldout()[:: max(1, len(heldout()) // count)][:count]
    runners = {}
    for i, (name, limits) in enumerate(settings((2, 4, 6)).items()):
        options = Options(max_length=MAX_LENGTH, block_length=8, cache="dual", **limits)  # type: ignore
        path = compile_checkpoint(MODEL, options, folder / f"shipped{i}.dcx")
        runners[name] = Runner.load(path, threads=1)
    prompts: list[object] = [e.prompt for e in chosen]
    return Case("shipped", prompts, GEN_LENGTH, MAX_LENGTH, runners, [e.answer for e in chosen])


def skewed(folder: Path) -> Case:
    runners = {}
    model = Skewed()
    for i, (name, limits) in enumerate(settings((16, 32, 48)).items()):
        options = Options(mask_id=511, max_length=192, block_length=32, cache="dual", **limits)  # type: ignore
        path = compile_module(model, options, folder / f"skewed{i}.dcx")
        runners[name] = Runner.load(path, threads=1)
    generator = torch.Generator().manual_seed(1)
    prompts: list[object] = [
        torch.randint(0, 511, (64,), generator=generator).tolist() for _ in range(2)
    ]
    return Case("skewed", prompts, 64, 64, runners, None)


def _show(rows: Sequence[Row]) -> None:
    for row in rows:
        print(
            f"{row.model:8} {row.limits:20} accuracy {row.accuracy:.3f}  forwards {row.forwards:5.2f}  "
            f"load {row.largest:5.1f} / {row.mean:4.1f}  touched {row.touched:5.1f} "
            f"{row.touched_by_layer}  {row.megabytes:6.2f} MB  lost {row.lost:.3f}  "
            f"{row.microseconds:7.1f} us"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = measure(skewed(Path(name)), given.rounds, 3 * 512 * 256 * 4)
        _show(rows)
        rows += measure(shipped(given.count, Path(name)), given.rounds, 3 * 128 * 128 * 4)
        _show([r for r in rows if r.model == "shipped"])
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
