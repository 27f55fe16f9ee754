"""Passes that need a whole step: what each does to a traced model, and what it leaves alone."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcompile.codegen.cpu.lower import lower
from dcompile.driver.pipeline import run
from dcompile.ir import operators
from dcompile.ir.edit import value
from dcompile.ir.program import Program, Stage, StepShape
from dcompile.ir.sizes import size_of
from dcompile.ir.weights import Source
from dcompile.options import Options
from dcompile.policies import find_policy
from dcompile.step.trace import Traced, trace

aten = torch.ops.aten
POSITIONS, BLOCK = 40, 4


class Model(nn.Module):
    """One layer with rotary attention and a mixture of experts, and its parts replaceable."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.norm = nn.RMSNorm(16, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts_gate = nn.Parameter(torch.randn(4, 8, 16))
        self.experts_up = nn.Parameter(torch.randn(4, 8, 16))
        self.experts_down = nn.Parameter(torch.randn(4, 16, 8))
        self.head = nn.Linear(16, 61)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def weigh(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        weights, chosen = scores.topk(2, -1)
        return torch.zeros_like(scores).scatter(-1, chosen, weights)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, ids: Tensor) -> Tensor:
        angles = torch.arange(ids.shape[1])[:, None] / 7.0 * torch.ones(8)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x = self.embed(ids)
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (2, 8)) for p in (self.q, self.k, self.v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.o(a.transpose(1, 2).flatten(2))
        gate = torch.einsum("btd,efd->btef", x, self.experts_gate)
        up = torch.einsum("btd,efd->btef", x, self.experts_up)
        y = torch.einsum("btef,edf,bte->btd", F.silu(gate) * up, self.experts_down, self.weigh(x))
        return self.logits(x + y)


def planned(model: nn.Module, **options: object) -> Program:
    shape = StepShape(2, POSITIONS, BLOCK, 60, torch.float32)
    recipes = {name: Source(name) for name, _ in model.named_parameters()}
    program = trace(model.eval(), Traced(shape, find_policy("threshold"), recipes))
    run(program, Options(**options))  # type: ignore[arg-type]
    return program


def count(program: Program, *targets: object) -> int:
    return len(list(program.calls(*targets)))


def left_alone(program: Program, name: str) -> bool:
    return any(r.pass_name == name for r in program.remarks)


def test_rotary_tables_are_folded_to_the_compiled_length() -> None:
    program = planned(Model(), stop_after="fold_constants")
    assert not count(program, aten.arange.default, aten.cos.default, aten.sin.default)
    assert {t.shape[0] for t in program.constants.values()} == {POSITIONS}
    table = next(iter(program.constants.values()))
    angles = torch.arange(POSITIONS)[:, None] / 7.0 * torch.ones(8)
    wanted = {"cos": angles.cos(), "sin": angles.sin()}
    flat = table.reshape(POSITIONS, 8)
    assert any(torch.equal(flat, w) for w in wanted.values())


def test_all_of_it_is_fused() -> None:
    program = planned(Model())
    assert count(program, operators.NORM_ROPE_WRITE) == count(program, operators.ATTEND) == 1
    assert count(program, operators.ROUTE) == count(program, operators.MOE_FFN) == 1
    assert count(program, operators.VOCAB_CHOICE) == 1
    assert not count(program, aten.einsum.default, operators.CHOOSE, operators.WRITE_ROWS)


def test_leaves_another_rotation() -> None:
    class Interleaved(Model):
        def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return x * cos + x.flip(-1) * sin

    program = planned(Interleaved())
    assert count(program, operators.WRITE_ROWS) == 2 and not count(
        program, operators.NORM_ROPE_WRITE
    )
    assert left_alone(program, "fuse_norm_rope_write")


@pytest.mark.parametrize("rest", [slice(None, 4), slice(None, None, 2)])
def test_leaves_a_rotation_with_another_rest(rest: slice) -> None:
    """What follows the rotated half of a head must be its other half."""

    class Partial(Model):
        def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            turned = super().rotate(x[..., :4], cos[..., :4], sin[..., :4])
            return torch.cat((turned, x[..., rest]), -1)

    program = planned(Partial())
    assert not count(program, operators.NORM_ROPE_WRITE) and left_alone(
        program, "fuse_norm_rope_write"
    )


def test_fuses_a_rotation_of_half_a_head() -> None:
    class Partial(Model):
        def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            turned = super().rotate(x[..., :4], cos[..., :4], sin[..., :4])
            return torch.cat((turned, x[..., 4:]), -1)

    assert count(planned(Partial()), operators.NORM_ROPE_WRITE) == 1


def test_leaves_a_gate_that_is_not_top_k() -> None:
    class Everyone(Model):
        def weigh(self, x: Tensor) -> Tensor:
            return self.gate(x).softmax(-1)

    program = planned(Everyone())
    assert count(program, aten.einsum.default) == 3 and not count(program, operators.MOE_FFN)
    assert left_alone(program, "fuse_moe")


def test_leaves_logits_that_are_changed_after_the_projection() -> None:
    class Capped(Model):
        def logits(self, x: Tensor) -> Tensor:
            return 30 * torch.tanh(self.head(x) / 30)

    program = planned(Capped())
    assert count(program, operators.CHOOSE) == 1 and not count(program, operators.VOCAB_CHOICE)
    assert left_alone(program, "fuse_vocab_choice")


def test_only_chosen_rows_are_projected_and_all_keys_are_written() -> None:
    program = planned(Model(), skip=("fuse_vocab_choice",))
    head = next(n for n in program.calls(aten.linear.default) if value(n).shape[-1] == 61)
    rows = size_of(value(head).shape[-2], program.symbols)
    assert rows == {"B": BLOCK}
    (write,) = program.calls(operators.NORM_ROPE_WRITE)
    assert size_of(value(write.args[0]).shape[0], program.symbols) == {"R": 1}  # type: ignore[arg-type]


def test_slots_are_shared_only_by_values_whose_lives_are_apart() -> None:
    program = planned(Model())
    lowered = lower(program)
    assert program.stage is Stage.BOUND
    plan = lowered.plan
    slot_of = {
        i: b["place"]["slot"] for i, b in enumerate(plan["buffers"]) if b["place"]["kind"] == "slot"
    }

    def root(index: int) -> int:
        place = plan["buffers"][index]["place"]
        return root(place["of"]) if place["kind"] == "view" else index

    born, last = {}, {}
    for at, launch in enumerate(plan["launches"]):
        for index in launch["writes"]:
            born[index] = at
        for argument in launch["args"]:
            if isinstance(argument, dict) and argument.get("b") is not None:
                last[root(argument["b"])] = at
    end = len(plan["launches"])
    for index in plan["outputs"].values():
        last[root(index)] = end
    by_slot: dict[int, list[int]] = {}
    for index, slot in slot_of.items():
        by_slot.setdefault(slot, []).append(index)
    assert len(by_slot) < len(slot_of)
    for shared in by_slot.values():
        lives = sorted((born[i], last.get(i, born[i])) for i in shared)
        for (_, ended), (begun, _) in itertools.pairwise(lives):
            assert ended < begun


def test_regions_cover_the_launches() -> None:
    plan = lower(planned(Model())).plan
    assert [(r["kind"], r["start"]) for r in plan["regions"]] == [("native", 0)]
    assert plan["regions"][-1]["end"] == len(plan["launches"])
