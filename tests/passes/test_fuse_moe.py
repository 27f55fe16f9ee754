"""fuse_moe: every spelling of a mixture of experts, routers of all kinds, and near misses left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import spellings
import torch
from check import body, run, small_program
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import Model, count, left_alone, planned
from spellings import NEAR_MISSES, ROUTERS, SPELLINGS, Mixture, Router, Sizes, Spelling
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Interpreter, Node

from dcompile.driver.pipeline import clean_up
from dcompile.ir import operators
from dcompile.ir.contract import verify
from dcompile.ir.program import Program
from dcompile.passes.canonicalize import Canonicalize
from dcompile.passes.fuse_moe import FuseMoE
from dcompile.step.expert_loops import traceable

aten = torch.ops.aten
USUAL = Sizes()
AFTER = """
v0: f32[1, R, 6] = v0.default(x, gate_weight)
v1: f32[R, 6] = reshape.default(v0, [-1, 6])
v2: (f32[R, 2], i32[R, 2]) = dcompile.route(v1, None, 2, 'softmax_chosen', 1, 1, False, 1.0)
v3: f32[R, 2] = getitem(v2, 0)
v4: i32[R, 2] = getitem(v2, 1)
v5: f32[R, 12] = reshape.default(x, [-1, 12])
v6: f32[R, 12] = dcompile.moe_ffn(v5, v3, v4, merged_0_both_gate_up, merged_0_down_down, None, None, 'silu')
v7: f32[1, R, 12] = reshape.default(v6, [1, -1, 12])
return (v7,)
"""


Parts = tuple[Program, dict[str, Tensor]]


def program_of(block: nn.Module, rows: int) -> Parts:
    """`block` as a small program of x [1, R, D], and all its tensors."""
    weights = {n.replace(".", "_"): p.detach() for n, p in block.named_parameters()}
    names = [n for n, _ in block.named_parameters()]

    def call(x: Tensor, *given: Tensor) -> tuple[Tensor]:
        with traceable(block):
            return (functional_call(block, dict(zip(names, given, strict=True)), (x,)),)

    inputs = {"x": torch.randn(1, rows, block.sizes.hidden)}  # type: ignore[union-attr]
    return small_program(call, inputs, weights, rows=1), {**inputs, **weights}


def fuse(program: Program) -> None:
    FuseMoE()(program)
    clean_up(program)
    Canonicalize()(program)
    clean_up(program)
    verify(program, "fuse_moe")


def experts_of(program: Program, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits, experts) of the route operator when the program runs."""
    seen: dict[Node, object] = {}

    class Watch(Interpreter):
        def run_node(self, n: Node) -> object:
            seen[n] = super().run_node(n)
            return seen[n]

    arguments = []
    for held in program.inputs:
        if held.kind == "constant":
            arguments.append(program.constants[held.name])
        elif held.kind == "weight":
            arguments.append(program.recipes[held.name].read(tensors.__getitem__))
        else:
            arguments.append(tensors[held.name])
    Watch(program.module).run(*arguments)
    (route,) = program.calls(operators.ROUTE)
    return seen[route.args[0]], seen[route][1]  # type: ignore[index,return-value]


def compare(block: nn.Module, rows: int = 7) -> Program:
    """Fused equals unfused to rounding, and the experts and their order are the model's."""
    program, tensors = program_of(block, rows)
    assert count(program, operators.ROUTE) == 0
    (wanted,) = (t.clone() for t in run(program, tensors))
    fuse(program)
    assert (count(program, operators.ROUTE), count(program, operators.MOE_FFN)) == (1, 1), (
        program.remarks
    )
    (got,) = run(program, tensors)
    assert_close(got, wanted.double(), 1e-5)
    mixture = getattr(block, "mixture", block)
    with torch.no_grad():
        _, experts = mixture.router(mixture, mixture.gate(tensors["x"]))
    assert torch.equal(experts_of(program, tensors)[1].long(), experts[0])
    return program


def build(router: Router, spelling: Spelling, sizes: Sizes = USUAL, seed: int = 0) -> Mixture:
    torch.manual_seed(seed)
    return Mixture(sizes, router, spelling)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_is_one_route_and_one_moe_ffn(spelling: Spelling) -> None:
    program = compare(build(spellings.softmax_renormalised, spelling))
    left = (aten.einsum.default, aten.bmm.default, aten.topk.default, aten.one_hot.default)
    assert count(program, *left) == 0
    assert count(program, aten.linear.default) == 1  # the router's


@pytest.mark.parametrize("router", ROUTERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spelling", [spellings.einsum_all, spellings.masked_loop])
def test_every_router(router: Router, spelling: Spelling) -> None:
    compare(build(router, spelling))


def test_experts_with_biases() -> None:
    program = compare(build(spellings.sigmoid_biased, spellings.where_loop, Sizes(biases=True)))
    (node,) = program.calls(operators.MOE_FFN)
    assert all(isinstance(a, Node) for a in node.args[5:7])


class Shared(nn.Module):
    """A mixture and what every token passes beside it: experts, gated or not, or the input itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.sizes = how, USUAL
        self.mixture = build(spellings.softmax_renormalised, spellings.index_add_loop)
        self.shared = nn.ModuleList(spellings.One(USUAL) for _ in range(2))
        self.opens = nn.Linear(USUAL.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixture(x)
        if self.how == "one":
            return y + self.shared[0](x)
        if self.how == "several":
            return self.shared[0](x) + y + self.shared[1](x)
        if self.how == "gated":
            return y + self.opens(x).sigmoid() * self.shared[0](x)
        return x + y


@pytest.mark.parametrize("how", ["one", "several", "gated", "residual"])
def test_what_stands_beside_a_mixture_stays(how: str) -> None:
    program = compare(Shared(how))
    kept = {"one": 4, "several": 7, "gated": 5, "residual": 1}[how]
    assert count(program, aten.linear.default) == kept


@pytest.mark.parametrize("start", ["shared", "residual"])
def test_experts_are_added_to_what_was_there(start: str) -> None:
    """The loop begins with another value than zeros."""

    def spelling(m: Mixture, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
        y = m.merged[0](x) if start == "shared" else x
        for e, expert in enumerate(m.each):
            y = y + expert(x) * (w * (index == e)).sum(-1, keepdim=True)
        return y

    compare(build(spellings.sigmoid_biased, spelling))


def test_the_graph_after_it() -> None:
    text = body(compare(build(spellings.softmax_of_chosen, spellings.where_loop)))
    assert text == AFTER.strip(), text


def test_a_dense_network_is_left_alone() -> None:
    """A gated FFN, with a choice beside it that weighs nothing."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes, self.ffn = USUAL, spellings.One(USUAL)

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(x) + x.topk(2, -1).values.sum(-1, keepdim=True)

    program, _ = program_of(Dense(), 7)
    fuse(program)
    assert not count(program, operators.ROUTE) and not program.remarks


def test_scores_below_float32_are_not_ranked_again() -> None:
    block = build(spellings.softmax, spellings.masked_loop).to(torch.bfloat16)
    weights = {n.replace(".", "_"): p.detach() for n, p in block.named_parameters()}
    names = [n for n, _ in block.named_parameters()]

    def call(x: Tensor, *given: Tensor) -> tuple[Tensor]:
        return (functional_call(block, dict(zip(names, given, strict=True)), (x,)),)

    program = small_program(call, {"x": torch.randn(1, 7, 12).bfloat16()}, weights, rows=1)
    fuse(program)
    (remark,) = program.remarks
    assert not count(program, operators.ROUTE) and "rounded to bfloat16" in remark.text


@pytest.mark.parametrize("spelling", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_misses_are_left_alone_and_say_why(spelling: Spelling) -> None:
    program, tensors = program_of(build(spellings.softmax, spelling), 7)
    before = run(program, tensors)[0].clone()
    fuse(program)
    assert count(program, operators.ROUTE, operators.MOE_FFN) == 0
    assert program.remarks and all(r.kind == "missed" and len(r.text) > 20 for r in program.remarks)
    assert torch.equal(run(program, tensors)[0], before)


def of_sorted_groups(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts: places among the scores as sorted in each group, not of the scores."""
    p = z.float().softmax(-1)
    ordered = p.view(*p.shape[:-1], 2, -1).topk(p.shape[-1] // 2).values.reshape(p.shape)
    index = ordered.topk(m.sizes.top_k).indices
    w = p.gather(-1, index)
    return w / w.sum(-1, keepdim=True), index


def of_sorted_logits(m: Mixture, z: Tensor) -> tuple[Tensor, Tensor]:
    index = z.float().sort(dim=-1, descending=True).values.topk(m.sizes.top_k).indices
    return z.float().gather(-1, index).softmax(-1), index


@pytest.mark.parametrize("router", [of_sorted_groups, of_sorted_logits])
def test_places_in_another_order_are_not_experts(router: Router) -> None:
    program, tensors = program_of(build(router, spellings.einsum_all), 7)
    before = run(program, tensors)[0].clone()
    fuse(program)
    assert_close(run(program, tensors)[0], before.double(), 1e-5)
    assert count(program, operators.ROUTE) == 0 and program.remarks


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    router=st.sampled_from(ROUTERS),
    spelling=st.sampled_from(SPELLINGS),
    hidden=st.integers(2, 17),
    inner=st.integers(2, 9),
    rows=st.integers(2, 9),
    data=st.data(),
)
def test_random_mixtures(
    router: Router,
    spelling: Spelling,
    hidden: int,
    inner: int,
    rows: int,
    data: st.DataObject,
) -> None:
    """Any count of experts, one and primes too, of which one to all are chosen."""
    random_mixture(router, spelling, hidden, inner, rows, data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(
    router=st.sampled_from(ROUTERS),
    spelling=st.sampled_from(SPELLINGS),
    hidden=st.integers(2, 17),
    inner=st.integers(2, 9),
    rows=st.integers(2, 9),
    data=st.data(),
)
def test_many_random_mixtures(
    router: Router,
    spelling: Spelling,
    hidden: int,
    inner: int,
    rows: int,
    data: st.DataObject,
) -> None:
    random_mixture(router, spelling, hidden, inner, rows, data)


def random_mixture(
    router: Router, spelling: Spelling, hidden: int, inner: int, rows: int, data: st.DataObject
) -> None:
    groups = kept = 1
    if router is spellings.grouped:
        groups, per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 4))
        kept = data.draw(st.integers(1, groups))
        experts, most = groups * per_group, kept * per_group
    else:
        experts = most = data.draw(st.integers(1, 11))
    top_k = data.draw(st.integers(1, most))
    sizes = Sizes(hidden, inner, experts, top_k, groups, kept, data.draw(st.booleans()))
    compare(build(router, spelling, sizes, data.draw(st.integers(0, 99))), rows)


def test_ties_go_to_the_lowest_index() -> None:
    block = build(spellings.softmax, spellings.einsum_all, replace(USUAL, top_k=4))
    with torch.no_grad():
        block.gate.weight[3:] = block.gate.weight[:3]
    program, tensors = program_of(block, 9)
    fuse(program)
    logits, experts = experts_of(program, tensors)
    wanted = logits.softmax(-1).sort(dim=-1, descending=True, stable=True).indices[:, :4]
    assert torch.equal(experts.long(), wanted)
    pairs = experts.view(9, 2, 2)
    assert bool((pairs[..., 0] + 3 == pairs[..., 1]).all())


def test_more_chosen_than_the_kept_groups_have_is_left_alone() -> None:
    """The third of two is any of those left out, whose order nobody says."""
    sizes = replace(USUAL, top_k=3, kept=1)
    program, _ = program_of(build(spellings.grouped, spellings.einsum_all, sizes), 7)
    fuse(program)
    assert not count(program, operators.ROUTE)
    assert "more than the kept groups have" in program.remarks[0].text


def test_leaves_a_gate_that_is_not_top_k() -> None:
    class Everyone(Model):
        def weigh(self, x: Tensor) -> Tensor:
            return self.gate(x).softmax(-1)

    program = planned(Everyone())
    assert count(program, aten.einsum.default) == 3 and not count(program, operators.MOE_FFN)
    assert left_alone(program, "fuse_moe")
