"""The plan as data: every value has a place, every launch its arguments; and the tensors that it stores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from dcompile.codegen.buffers import Buffers, plan_buffers
from dcompile.codegen.launches import Argument, Float, Int, Launch, Schedule
from dcompile.codegen.pack import pack_linear, packed_size
from dcompile.ir.edit import value
from dcompile.ir.meta import facts
from dcompile.ir.program import Program, Stage
from dcompile.ir.show import SHORT
from dcompile.ir.sizes import size_of
from dcompile.ir.weights import Read, Recipe, Stack


def bind(program: Program, plan: Schedule) -> tuple[dict[str, Any], Buffers]:
    """The plan as data, with a place for every value; the program becomes BOUND."""
    buffers = plan_buffers(program, plan)
    launches = [_launch(program, item, buffers) for item in plan.launches]
    (returned,) = program.result().args
    state = {
        i.name: buffers.index[program.placeholder(i.name)]
        for i in program.inputs
        if i.kind == "state"
    }
    inputs = {
        i.name: buffers.index[program.placeholder(i.name)]
        for i in program.inputs
        if i.kind == "step"
    }
    outputs = {
        output.name: _place(buffers, plan, node)
        for node, output in zip(returned, program.outputs, strict=True)  # type: ignore[arg-type]
        if output.state is None
    }
    shape = program.shape
    sizes = {"N": shape.slots, "L": shape.positions, "n": shape.block_length}
    if shape.blocks > 1:
        sizes["blocks"] = shape.blocks
    text = {
        "symbols": ["R", "B"],
        "sizes": sizes,
        "buffers": buffers.table,
        "slots": buffers.slots,
        "launches": launches,
        "regions": cut_regions(plan.launches),
        "inputs": inputs,
        "state": state,
        "outputs": outputs,
    }
    program.stage = Stage.BOUND
    return text, buffers


def _place(buffers: Buffers, plan: Schedule, node: Node) -> int:
    return buffers.index[node] if node in buffers.index else buffers.index[plan.aliases[node]]


def cut_regions(launches: list[Launch]) -> list[dict[str, Any]]:
    """Runs of launches of one kind: a native run is one call, and later one captured graph."""
    out, at = [], 0
    for kind, run in itertools.groupby(launches, key=lambda item: item.kind):
        end = at + len(list(run))
        out.append({"kind": kind, "start": at, "end": end})
        at = end
    return out


def _launch(program: Program, launch: Launch, buffers: Buffers) -> dict[str, Any]:
    found = facts(launch.node)
    role = found.role or launch.kernel.rpartition("_")[0] or launch.kernel
    if launch.variant is not None:
        role = found.role or launch.variant.kernel.rpartition(":")[2]
    text: dict[str, Any] = {
        "name": f"{found.origin or 'step'}.{launch.kernel}",
        "kernel": launch.kernel,
        "where": launch.kind,
        "args": [_argument(a, buffers) for a in launch.args],
        "writes": [buffers.index[n] for n in launch.writes],
        "layer": found.layer,
        "role": role,
        "origin": found.origin,
        "nodes": [n.name for n in launch.covers],
    }
    if launch.kind == "cuda":
        text["grid"] = list(launch.grid)
    if launch.kind == "aten":
        node = launch.node
        text["args"] = [_torch_argument(program, a, buffers) for a in node.args]
        kwargs = {k: _torch_argument(program, a, buffers) for k, a in node.kwargs.items()}
        text["kwargs"] = {
            k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")
        }
        if isinstance(node.meta["val"], (tuple, list)):
            by_index = {u.args[1]: buffers.index[u] for u in launch.writes}
            text["writes"] = [by_index.get(i) for i in range(len(node.meta["val"]))]
    return text


def _argument(argument: Argument, buffers: Buffers) -> dict[str, Any]:
    if isinstance(argument, Int):
        return {"i": argument.value}
    if isinstance(argument, Float):
        return {"f": argument.value}
    return {"b": buffers.arguments[argument]}


def _torch_argument(program: Program, argument: object, buffers: Buffers) -> Any:
    if isinstance(argument, Node):
        if isinstance(argument.meta["val"], torch.Tensor):
            return {"b": buffers.index[argument]}
        return {"i": size_of(argument.meta["val"], program.symbols)}
    if isinstance(argument, (list, tuple)):
        return [_torch_argument(program, a, buffers) for a in argument]
    if isinstance(argument, torch.dtype):
        return {"dtype": SHORT[argument]}
    return argument


def stored_of(buffers: Buffers) -> list[tuple[str, str, str]]:
    out = []
    for key, index in buffers.index.items():
        place = buffers.table[index]["place"]
        if place["kind"] not in ("weight", "constant"):
            continue
        node, layout = key if isinstance(key, tuple) else (key, "plain")
        out.append((place["tensor"], node.name, layout))
    return out


def stored_tensors(
    program: Program, stored: list[tuple[str, str, str]], read: Read
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the artifact, made one at a time from the checkpoint."""
    for tensor, name, layout in stored:
        if name in program.constants:
            yield tensor, program.constants[name].contiguous()
            continue
        wanted = value(program.placeholder(name))
        recipe = program.recipes[name]
        if layout == "plain":
            yield tensor, recipe.read(read).to(wanted.dtype).contiguous()
        elif layout == "packed":
            yield tensor, pack_linear(recipe.read(read).to(wanted.dtype))
        else:
            yield tensor, _experts(recipe, read, wanted)


def _experts(recipe: Recipe, read: Read, wanted: torch.Tensor) -> torch.Tensor:
    """Stacked experts, packed one after the other, so that only one is held beside the result."""
    count, n, k = (int(d) for d in wanted.shape)
    size = packed_size(n, k, wanted.dtype)
    out = torch.empty(count * size, dtype=wanted.dtype)
    whole = None if isinstance(recipe, Stack) else recipe.read(read)
    for e in range(count):
        part = recipe.parts[e].read(read) if isinstance(recipe, Stack) else whole[e]  # type: ignore
        pack_linear(part.to(wanted.dtype), out[e * size : (e + 1) * size])
    return out
