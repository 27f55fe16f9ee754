"""Layers of one kind are traced once; the others are copies of that graph with other weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from dcompile.ir.meta import KEY, facts
from dcompile.ir.program import Input, Program
from dcompile.ir.weights import Concat, Item, Recipe, Rows, Source, Stack, Turn


@dataclass(frozen=True)
class Run:
    """Consecutive layers of one kind, by index in the full model; the first is the one traced."""

    layers: tuple[int, ...]


def runs_of(kinds: Sequence[str]) -> tuple[Run, ...]:
    """Group consecutive equal kinds: ("dense", "moe", "moe") -> (0,), (1, 2)."""
    out: list[Run] = []
    for i, kind in enumerate(kinds):
        if out and kinds[out[-1].layers[0]] == kind:
            out[-1] = Run((*out[-1].layers, i))
        else:
            out.append(Run((i,)))
    return tuple(out)


def repeat_layers(program: Program, runs: Sequence[Run]) -> None:
    """Put the other layers of each run after its first, which is the one that was traced.

    A layer's nodes read one value that the layer before produced (the hidden state), and values that
    all layers share; the copies read the hidden state of the layer before them.
    """
    previous_out: Node | None = None
    for run in runs:
        body = [n for n in program.nodes() if _traced_layer(n) == run.layers[0]]
        inside = set(body)
        (out,) = [n for n in body if any(u not in inside for u in n.users)]
        entry = _entry(body, inside, previous_out)
        last = out
        for layer in run.layers[1:]:
            last = _copy(program, body, entry, last, out, run.layers[0], layer)
        previous_out = last


def _traced_layer(node: Node) -> int | None:
    found = re.search(r"\blayers\.(\d+)\b", facts(node).origin)
    return int(found[1]) if found and node.op == "call_function" else None


def _entry(body: list[Node], inside: set[Node], previous: Node | None) -> Node:
    """The hidden state that the layer reads: what the layer before made, or the first of its shape."""
    outside = {a for n in body for a in n.all_input_nodes if a not in inside}
    if previous is not None and previous in outside:
        return previous
    first = next(
        a for n in body for a in n.all_input_nodes if a in outside and a.op != "placeholder"
    )
    return first


def _settle(node: Node, layer: int) -> None:
    found = facts(node)
    origin = re.sub(r"\blayers\.\d+\b", f"layers.{layer}", found.origin)
    node.meta[KEY] = replace(found, origin=origin, layer=layer)


def _weights(body: list[Node]) -> list[Node]:
    inside = set(body)
    out: dict[Node, None] = {}
    for node in body:
        for arg in node.all_input_nodes:
            if arg not in inside and arg.op == "placeholder" and "layers_" in arg.name:
                out[arg] = None
    return list(out)


def _copy(
    program: Program,
    body: list[Node],
    entry: Node,
    hidden: Node,
    out: Node,
    first: int,
    layer: int,
) -> Node:
    """Copy `body` after `hidden`, reading `hidden` for `entry`; give its output to later readers."""
    swap: dict[Node, Node] = {entry: hidden}
    for weight in _weights(body):
        swap[weight] = _copy_weight(program, weight, first, layer)
    inside = set(body)
    readers = [u for u in hidden.users if u not in inside and facts(u).layer != layer]
    anchor = hidden if hidden not in inside else body[-1]
    if hidden is not out:
        anchor = max(
            (n for n in program.graph.nodes if facts(n).layer == layer - 1), key=_order(program)
        )
    for node in body:
        with program.graph.inserting_after(anchor):
            twin = program.graph.node_copy(node, lambda n: swap.get(n, n))
        twin.meta = dict(node.meta)
        _settle(twin, layer)
        swap[node] = twin
        anchor = twin
    result = swap[out]
    for user in readers:
        user.replace_input_with(hidden, result)
    return result


def _order(program: Program):  # type: ignore[no-untyped-def]
    place = {n: i for i, n in enumerate(program.graph.nodes)}
    return place.__getitem__


def _copy_weight(program: Program, weight: Node, first: int, layer: int) -> Node:
    name = re.sub(rf"layers_{first}(?=_)", f"layers_{layer}", weight.name)
    item = program.input(weight.name)
    last = max(
        (i for i, other in enumerate(program.inputs) if other.kind == "weight"),
    )
    holders = [n for n in program.graph.nodes if n.op == "placeholder"]
    with program.graph.inserting_after(holders[last]):
        node = program.graph.placeholder(name)
    node.meta = dict(weight.meta)
    node.meta[KEY] = facts(weight)
    program.inputs.insert(last + 1, Input(name, item.kind))
    program.recipes[name] = _renumber(program.recipes[weight.name], first, layer)
    return node


def _renumber(recipe: Recipe, first: int, layer: int) -> Recipe:
    """The same tensors of another layer: the first `.{first}.` of each name is the layer's number."""
    if isinstance(recipe, Source):
        return Source(re.sub(rf"\.{first}\.", f".{layer}.", recipe.name, count=1))
    if isinstance(recipe, (Item, Turn, Rows)):
        return replace(recipe, of=_renumber(recipe.of, first, layer))
    parts = tuple(_renumber(part, first, layer) for part in recipe.parts)
    if isinstance(recipe, Stack):
        return Stack(parts)
    return Concat(parts, recipe.dim)
