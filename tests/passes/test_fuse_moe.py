"""fuse_moe: every spelling of a mixture of experts, routers of all kinds, and near misses left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import spellings
import torch
from check import run, small_program
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from spellings import NEAR_MISSES, ROUTERS, SPELLINGS, Mixture, Router, Sizes, Spelling
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Interpreter, Node

from dcompile.ir import ops
from dcompile.ir.contract import verify
from dcompile.ir.program import Program
from dcompile.loops import traceable
from dcompile.passes.canonicalize import Canonicalize
from dcompile.passes.fuse_moe import FuseMoE
from dcompile.pipeline import clean_up

aten = torch.ops.aten
USUAL = Sizes()


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
    (route,) = program.calls(ops.ROUTE)
    return seen[route.args[0]], seen[route][1]  # type: ignore[index,return-value]


def compare(block: Mixture, rows: int = 7) -> Program:
    """Fused equals unfused to rounding, and the experts and their order are the model's."""
    program, tensors = program_of(block, rows)
    assert count(program, ops.ROUTE) == 0
    (wanted,) = (t.clone() for t in run(program, tensors))
    fuse(program)
    assert (count(program, ops.ROUTE), count(program, ops.MOE_FFN)) == (1, 1), program.remarks
    (got,) = run(program, tensors)
    assert_close(got, wanted.double(), 1e-5)
    with torch.no_grad():
        _, experts = block.router(block, block.gate(tensors["x"]))
    assert torch.equal(experts_of(program, tensors)[1].long(), experts[0])
    return program


def count(program: Program, *targets: object) -> int:
    return len(list(program.calls(*targets)))


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
    (node,) = program.calls(ops.MOE_FFN)
    assert all(isinstance(a, Node) for a in node.args[5:7])


@pytest.mark.parametrize("spelling", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_misses_are_left_alone_and_say_why(spelling: Spelling) -> None:
    program, tensors = program_of(build(spellings.softmax, spelling), 7)
    before = run(program, tensors)[0].clone()
    fuse(program)
    assert count(program, ops.ROUTE, ops.MOE_FFN) == 0
    assert program.remarks and all(r.kind == "missed" and len(r.text) > 20 for r in program.remarks)
    assert torch.equal(run(program, tensors)[0], before)


@settings(max_examples=8, deadline=None)
@given(
    router=st.sampled_from(ROUTERS),
    spelling=st.sampled_from(SPELLINGS),
    groups=st.integers(1, 3),
    per_group=st.integers(2, 4),
    hidden=st.integers(2, 17),
    inner=st.integers(2, 9),
    rows=st.integers(2, 9),
    data=st.data(),
)
def test_random_mixtures(
    router: Router,
    spelling: Spelling,
    groups: int,
    per_group: int,
    hidden: int,
    inner: int,
    rows: int,
    data: st.DataObject,
) -> None:
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(
        st.integers(1, kept * per_group if router is spellings.grouped else groups * per_group)
    )
    sizes = Sizes(hidden, inner, groups * per_group, top_k, groups, kept, data.draw(st.booleans()))
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
