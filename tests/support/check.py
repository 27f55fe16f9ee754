"""Trace a small function into a program, run a pass, verify the contract, compare text and numbers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim

from dcompile.driver.pipeline import clean_up
from dcompile.ir.contract import verify
from dcompile.ir.edit import value
from dcompile.ir.meta import KEY, Facts
from dcompile.ir.program import Exactness, Input, Output, Pass, Program, Stage, StepShape
from dcompile.ir.show import show
from dcompile.ir.weights import Source
from dcompile.passes.canonicalize import Canonicalize

SHAPE = StepShape(slots=1, positions=32, block_length=4, mask_id=0, dtype=torch.float32)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


class _Function(nn.Module):
    def __init__(self, fn: Callable[..., object], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.fn = fn
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, *inputs: Tensor) -> object:
        return self.fn(*inputs, *(p for _, p in self.named_parameters()))


def small_program(
    fn: Callable[..., object],
    inputs: dict[str, Tensor],
    weights: dict[str, Tensor] | None = None,
    rows: int = 0,
    canonical: bool = True,
) -> Program:
    """A program of `fn(*inputs, *weights)`; axis `rows` of every input is R."""
    module = _Function(fn, weights or {})
    dynamic = (tuple({rows: Dim.DYNAMIC} for _ in inputs),)
    exported = torch.export.export(
        module, tuple(inputs.values()), dynamic_shapes=dynamic, strict=False
    ).run_decompositions({})
    graph = torch.fx.GraphModule({}, exported.graph)
    holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    lifted = [s for s in exported.graph_signature.input_specs if s.kind.name == "CONSTANT_TENSOR"]
    constants = {s.arg.name: exported.constants[s.target] for s in lifted}
    names = [*(weights or {}), *constants, *inputs]
    items = []
    for node, name in zip(holders, names, strict=True):
        node._rename(name)
        node.target = name
        known = "weight" if name in (weights or {}) else "constant" if name in constants else "step"
        items.append(Input(name, known))
    for node in graph.graph.nodes:
        node.meta = {"val": node.meta.get("val"), KEY: Facts()}
    (result,) = graph.graph.output_node().args
    outputs = [Output(f"out{i}") for i in range(len(result))]
    symbols = {str(n.meta["val"].shape[rows].node.expr): "R" for n in holders if n.name in inputs}
    program = Program(
        graph, items, outputs, SHAPE, {n: Source(n) for n in weights or {}}, constants, symbols
    )
    program.stage = Stage.PLANNED
    if canonical:
        Canonicalize()(program)
        clean_up(program)
    return program


def run(program: Program, tensors: dict[str, Tensor]) -> Sequence[Tensor]:
    """The program's outputs, with every weight made by its recipe."""
    arguments = []
    for item in program.inputs:
        if item.name in tensors:
            arguments.append(tensors[item.name])
        elif item.kind == "constant":
            arguments.append(program.constants[item.name])
        else:
            made = program.recipes[item.name].read(tensors.__getitem__)
            arguments.append(made.to(value(program.placeholder(item.name)).dtype))
    out: Sequence[Tensor] = torch.fx.Interpreter(program.module).run(*arguments)
    return out


def body(program: Program) -> str:
    """The calls of a program, with names numbered in order, so that texts can be compared."""
    lines = [line for line in show(program).splitlines() if " = " in line or "return" in line]
    text = "\n".join(line.partition("  #")[0] for line in lines)
    for i, line in enumerate(lines):
        if " = " in line:
            name = line.partition(":")[0]
            text = re.sub(rf"\b{name}\b(?!\()", f"v{i}", text)
    return text


def check_pass(
    item: Pass,
    fn: Callable[..., object],
    inputs: dict[str, Tensor],
    weights: dict[str, Tensor] | None = None,
    *,
    after: str | None = None,
    places: int | None = None,
    rows: int = 0,
    prepare: Sequence[Pass] = (),
) -> Program:
    """Run `item`; compare the printed graph with `after`, and the outputs before and after."""
    program = small_program(fn, inputs, weights, rows)
    for earlier in prepare:
        earlier(program)
    tensors = {**inputs, **(weights or {})}
    before = [t.clone() for t in run(program, tensors)]
    changed = item(program)
    clean_up(program)
    verify(program, type(item).__name__)
    for was, now in zip(before, run(program, tensors), strict=True):
        if item.exactness is Exactness.EXACT:
            assert torch.equal(was, now)
        else:
            torch.testing.assert_close(now, was, rtol=1e-4, atol=1e-5)
    if after is not None:
        wanted = textwrap.dedent(after).strip()
        assert body(program) == wanted, f"got\n{body(program)}\nwanted\n{wanted}"
    if places is not None:
        assert changed == places
    return program
