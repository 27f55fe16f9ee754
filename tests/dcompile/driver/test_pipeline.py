"""The list of passes, and what `run` does around each of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from check import small_program
from planned import Model, count, planned

from dcompile.driver import pipeline
from dcompile.driver.pipeline import name_of, passes, run
from dcompile.driver.record import Announcer, Recorder
from dcompile.ir import operators
from dcompile.ir.program import Exactness, Pass, Program
from dcompile.options import Options

aten = torch.ops.aten
EVERYTHING = Options(moe_capacity=1.5, smoothing=0.3)


@dataclass(frozen=True)
class ViewsTwice:
    """Leaves what canonical form does not have: a view of a view, and a call that nobody reads."""

    exactness = Exactness.EXACT

    def __call__(self, program: Program) -> int:
        (product,) = program.calls(aten.mul.Tensor)
        with program.graph.inserting_after(product):
            first = program.graph.call_function(aten.unsqueeze.default, (product, 0))
        with program.graph.inserting_after(first):
            again = program.graph.call_function(aten.squeeze.dim, (first, 0))
            unused = program.graph.call_function(aten.neg.default, (product,))
        first.meta = {**product.meta, "val": product.meta["val"].unsqueeze(0)}
        again.meta, unused.meta = dict(product.meta), dict(product.meta)
        program.result().replace_input_with(product, again)
        return 1


@dataclass(frozen=True)
class Nothing:
    exactness = Exactness.EXACT

    def __call__(self, program: Program) -> int:
        return 0


@dataclass
class Told:
    heard: list[str] = field(default_factory=list)

    def before(self, program: Program, item: Pass) -> None:
        self.heard.append(f"before {name_of(item)}")

    def after(self, program: Program, item: Pass, changed: int) -> None:
        self.heard.append(f"after {name_of(item)}: {changed}")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr(pipeline, "passes", lambda options: (ViewsTwice(), Nothing()))
    return small_program(lambda x: (x * 2,), {"x": torch.randn(5, 3)})


def test_each_step_stands_once() -> None:
    names = [name_of(item) for item in passes(EVERYTHING)]
    assert len(names) == len(set(names)) == 13
    assert set(names) - {name_of(item) for item in passes(Options())} == {
        "limit_experts",
        "fuse_soft_embed",
    }


def test_observers_are_told_of_each_pass_in_order(program: Program) -> None:
    told, said = Told(), list[str]()
    run(program, Options(), told, Announcer(said.append))
    assert told.heard == [
        *("before views_twice", "after views_twice: 1"),
        *("before nothing", "after nothing: 0"),
    ]
    assert said == ["views_twice", "nothing"]


def test_a_program_is_canonical_after_a_pass(program: Program) -> None:
    before, recorder = len(program.graph.nodes), Recorder()
    run(program, Options(), recorder)
    (record,) = recorder.records
    assert (record.name, record.changed) == ("views_twice", 1)
    assert (record.nodes_before, record.nodes_after) == (before, before)
    assert "neg" not in record.text and "squeeze" not in record.text


def test_a_pass_is_left_out_and_the_last_one_named(program: Program) -> None:
    skipping, stopping = Told(), Told()
    run(program, Options(skip=("views_twice",)), skipping)
    assert skipping.heard == ["before nothing", "after nothing: 0"]
    run(program, Options(stop_after="views_twice"), stopping)
    assert stopping.heard == ["before views_twice", "after views_twice: 1"]


def test_all_of_a_step_is_fused() -> None:
    program = planned(Model())
    assert count(program, operators.NORM_ROPE_WRITE) == count(program, operators.ATTEND) == 1
    assert count(program, operators.ROUTE) == count(program, operators.MOE_FFN) == 1
    assert count(program, operators.VOCAB_CHOICE) == 1
    assert not count(program, aten.einsum.default, operators.CHOOSE, operators.WRITE_ROWS)
