"""A result is its own request's: no other slot, order, neighbour or earlier request changes it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quick import compile_quickly

from dcompile import cli
from dcompile.options import Options
from dcompile.runtime.decode.caches import cache_policy
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result
from dcompile.runtime.decode.slots import slots_of

SLOTS, LENGTH = 4, 16
ENDS = tuple(range(0, 128, 16))  # many, so that requests end at different blocks
DRAW = random.Random(29)
PROMPTS = [DRAW.choices(range(1, 120), k=n) for n in (0, 1, 5, 7, 8, 13, 16, 23)]
Facts = tuple[list[int], int]


@dataclass(frozen=True)
class Case:
    policy: str
    cache: str = "none"
    family: str = "llada_moe"
    asked: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join((self.family, self.policy, self.cache, *map(str, self.options.values())))

    def compiled(self) -> Options:
        block = None if self.family == "llada2" else 8
        facts = {"policy": self.policy, "cache": self.cache, "block_length": block}
        return Options(max_length=64, batch=SLOTS, eos_ids=ENDS, **facts, **self.options)  # type: ignore[arg-type]


SOME = {"threshold": 0.1}
CASES = [
    Case("threshold", "none", asked=SOME),
    Case("threshold", "dual", asked={**SOME, "temperature": 0.9, "seed": 5}),
    Case("threshold", "prefix", asked=SOME),
    Case("threshold", "vicinity", asked=SOME, options={"warmup": 2, "look_back": 3}),
    Case("threshold", "periodic", asked=SOME, options={"refresh_every": 2}),
    Case("threshold", "active", asked=SOME),
    Case("credit", "none", asked=SOME),
    Case("credit", "active", asked={**SOME, "temperature": 0.9}),
    Case("edit", "none", asked={**SOME, "threshold_edit": 0.15, "post_steps": 3}),
    Case("edit", "dual", asked={**SOME, "threshold_edit": 0.1, "post_steps": 5}),
    Case("remask", "none", asked={**SOME, "threshold_remask": 0.1}),
    Case("steps", "none", asked={"steps": 3}, options={"score": "random"}),
    Case("threshold", "block", "llada2", asked=SOME),
    Case("threshold", "block", "llada2", asked=SOME, options={"cross_block": False}),
    Case("credit", "block", "llada2", asked=SOME),
    Case("d2f", "block", "llada2", asked=SOME, options={"manager": "pipelined"}),
]


@dataclass
class Made:
    case: Case
    artifact: Path
    runner: Runner
    alone: dict[tuple[int, int, bool], Facts] = field(default_factory=dict)

    def fresh(self) -> Runner:
        runner = Runner.load(self.artifact, verify=False)
        runner.cache = self.runner.cache
        return runner

    def facts(self, index: int, repeat: int, early_stop: bool) -> Facts:
        """Of prompt `index`, asked the `repeat`-th time, by a runner that never served another."""
        key = (index, repeat, early_stop)
        if key not in self.alone:
            runner = self.fresh()
            runner.limits = replace(runner.limits, batch=1)
            asked = [PROMPTS[index]] * (repeat + 1)
            self.alone[key] = facts(self.generate(runner, asked, early_stop)[-1])
        return self.alone[key]

    def generate(
        self, runner: Runner, prompts: Sequence[list[int]], early_stop: bool, **more: Any
    ) -> list[Result]:
        asked = {**self.case.asked, **more}
        return runner.generate(prompts, gen_length=LENGTH, early_stop=early_stop, **asked)


_COMPILED = ("score", "cross_block", "manager")  # options that are more than a choice of rows
Build = Callable[[Case], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Artifacts, one for all cases that differ only in what the loop does."""
    artifacts: dict[tuple[object, ...], Path] = {}

    def artifact(case: Case) -> Path:
        key = (case.family, case.policy, *map(case.options.get, _COMPILED))
        if key not in artifacts:
            root = tmp_path_factory.mktemp("batching")
            folder = write_checkpoint(root / "checkpoint", case.family)
            artifacts[key] = compile_quickly(folder, case.compiled(), root / "model.dcx")
        return artifacts[key]

    return artifact


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def made(request: pytest.FixtureRequest, build: Build) -> Made:
    case: Case = request.param
    runner = Runner.load(build(case), verify=False)
    runner.cache = cache_policy(case.compiled().record(), runner.limits.span)
    return Made(case, build(case), runner)


def facts(result: Result) -> Facts:
    return result.all_tokens, result.forwards


def repeats(order: Sequence[int]) -> list[int]:
    """How often each was asked before it."""
    return [order[:place].count(index) for place, index in enumerate(order)]


def first_done(forwards: Sequence[int], slots: int) -> list[int]:
    """The order in which a queue's requests end, the next one taking a free slot at once."""
    waiting, active, order = list(range(len(forwards))), dict[int, int](), list[int]()
    while waiting or active:
        while waiting and len(active) < slots:
            active[waiting[0]] = forwards[waiting[0]]
            waiting.pop(0)
        turns = min(active.values())
        active = {index: left - turns for index, left in active.items()}
        order += [index for index, left in active.items() if not left]
        active = {index: left for index, left in active.items() if left}
    return order


# One runner serves all examples, one after the other, so what it keeps of a request is tested too.
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.lists(st.sampled_from(range(len(PROMPTS))), min_size=1, max_size=9),
    slots=st.integers(1, SLOTS),
    early_stop=st.booleans(),
)
def test_a_result_is_the_one_of_the_request_alone(
    made: Made, order: list[int], slots: int, early_stop: bool
) -> None:
    runner = made.runner
    runner.slots = slots_of(runner.artifact, runner.executor, runner.limits)[:slots]
    told: list[tuple[int, Result]] = []
    asked = [PROMPTS[index] for index in order]
    results = made.generate(
        made.runner, asked, early_stop, on_result=lambda *found: told.append(found)
    )
    wanted = [
        made.facts(index, repeat, early_stop)
        for index, repeat in zip(order, repeats(order), strict=True)
    ]
    assert [facts(result) for result in results] == wanted
    assert [index for index, _ in told] == first_done([n for _, n in wanted], slots)
    assert all(result is results[index] for index, result in told)


def test_the_requests_differ(made: Made) -> None:
    """In tokens and in forwards; otherwise the property says little."""
    found = [made.facts(index, 0, True) for index in range(len(PROMPTS))]
    assert len({tuple(tokens) for tokens, _ in found}) > len(found) // 2
    assert len({forwards for _, forwards in found}) > 1


def test_slots_that_were_compiled_are_the_same(tmp_path: Path) -> None:
    """Compiled for one sequence or for several."""
    folder = write_checkpoint(tmp_path / "checkpoint", "llada_moe")
    found = []
    for batch in (1, 3):
        options = Options(max_length=64, batch=batch, block_length=8, eos_ids=ENDS, cache="dual")
        runner = Runner.load(compile_quickly(folder, options, tmp_path / f"{batch}.dcx"))
        found.append([facts(r) for r in runner.generate(PROMPTS, gen_length=LENGTH, **SOME)])
    assert found[0] == found[1]


def test_the_queue_of_the_command_line(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = build(CASES[0])
    order = DRAW.choices(range(len(PROMPTS)), k=11)
    file = tmp_path / "queue.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": PROMPTS[i]}) + "\n" for i in order))
    asked = ["--queue", str(file), "--gen-length", str(LENGTH), "--threshold", "0.1"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", str(artifact), *asked])
    assert not caught.value.code
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    runner = Runner.load(artifact)
    alone = [runner.generate([PROMPTS[i]], gen_length=LENGTH, **SOME)[0] for i in order]
    assert [line["index"] for line in told] == first_done([r.forwards for r in alone], SLOTS)
    for line in told:
        result = alone[line["index"]]
        assert (line["all_tokens"], line["forwards"]) == facts(result)
