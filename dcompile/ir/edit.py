"""Small edits of a program's graph that keep values' metadata right."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node
from torch.utils._pytree import tree_map

from dcompile.ir.meta import KEY, facts
from dcompile.ir.program import Holds, Input, Kind, Program
from dcompile.ir.weights import Recipe


def value(node: object) -> torch.Tensor:
    """The fake tensor that stands for the value of a node, such as an argument of a call."""
    assert isinstance(node, Node), f"{node!r} is no value of the step"
    val = node.meta["val"]
    assert isinstance(val, torch.Tensor), f"{node.name} is not a tensor"
    return val


def propagate(program: Program, node: Node) -> None:
    """Compute the node's value from its arguments' values.

    Equal calls on equal shapes have equal values, and layers are alike: each is computed once.
    """
    args = tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, node.args)
    kwargs = tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, node.kwargs)
    key = (node.target, _signature(args), _signature(kwargs))
    if key not in program.known:
        assert callable(node.target)
        mode = next(iter(_fake_modes(args)), contextlib.nullcontext())
        # The Python decompositions keep sizes symbolic; C++ ones may ask for plain integers.
        with mode, enable_python_dispatcher():
            program.known[key] = node.target(*args, **kwargs)
    node.meta["val"] = program.known[key]


def _signature(args: object) -> tuple[object, ...]:
    leaves, spec = torch.utils._pytree.tree_flatten(args)
    out: list[object] = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            out.append((leaf.dtype, str(tuple(leaf.shape)), str(leaf.stride())))
        else:
            out.append((type(leaf), str(leaf)))
    return tuple(out)


def _fake_modes(args: object) -> list[torch._subclasses.FakeTensorMode]:
    flat = torch.utils._pytree.tree_leaves(args)
    return [a.fake_mode for a in flat if isinstance(a, torch._subclasses.FakeTensor)]


def insert(
    program: Program,
    at: Node,
    target: Callable[..., object],
    *args: object,
    like: Node | None = None,
) -> Node:
    """A new call before `at`; its facts are those of `like` (by default of `at`)."""
    with program.graph.inserting_before(at):
        node = program.graph.call_function(target, args)  # type: ignore[arg-type]
    propagate(program, node)
    source = like if like is not None else at
    if source.op != "output":
        node.meta[KEY] = facts(source)
    return node


def replace(program: Program, old: Node, target: Callable[..., object], *args: object) -> Node:
    """Put a call in the place of `old`, with its facts, and let its readers read the new one."""
    node = insert(program, old, target, *args, like=old)
    old.replace_all_uses_with(node)
    program.graph.erase_node(old)
    return node


def bypass(program: Program, node: Node, source: Node) -> None:
    """Let the readers of `node` read `source`, and drop `node`."""
    node.replace_all_uses_with(source)
    program.graph.erase_node(node)


def add_input(
    program: Program, name: str, kind: Kind, val: torch.Tensor, holds: Holds | None = None
) -> Node:
    """A new placeholder after those of its kind (or first)."""
    same = [i for i, item in enumerate(program.inputs) if item.kind == kind]
    index = same[-1] + 1 if same else 0
    holders = [n for n in program.graph.nodes if n.op == "placeholder"]
    if index < len(holders):
        context = program.graph.inserting_before(holders[index])
    else:
        context = program.graph.inserting_after(holders[-1])
    with context:
        node = program.graph.placeholder(name)
    if node.name != name:  # FX turns names into snake case
        node._rename(name)
    assert node.name == name, f"the input {name} exists already"
    node.target = name
    node.meta["val"] = val
    program.inputs.insert(index, Input(name, kind, holds))
    return node


def drop_unused_inputs(program: Program) -> None:
    """Remove weights and constants that nothing reads any more."""
    for node in [n for n in program.graph.nodes if n.op == "placeholder"]:
        item = program.input(node.name)
        if node.users or item.kind not in ("weight", "constant"):
            continue
        program.graph.erase_node(node)
        program.inputs.remove(item)
        program.recipes.pop(node.name, None)
        program.constants.pop(node.name, None)


def fake_mode(program: Program) -> torch._subclasses.FakeTensorMode:
    for node in program.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch._subclasses.FakeTensor):
            return val.fake_mode
    raise AssertionError("a program has tensors")


def add_constant(program: Program, name: str, tensor: torch.Tensor) -> Node:
    """A tensor that the compiler computed, as an input of the graph."""
    unique = _unused(program, name)
    with fake_mode(program):
        val = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    program.constants[unique] = tensor
    return add_input(program, unique, "constant", val)


def _unused(program: Program, name: str) -> str:
    taken = {n.name for n in program.graph.nodes}
    unique, count = name, 1
    while unique in taken:
        unique, count = f"{name}_{count}", count + 1
    return unique


def add_weight(program: Program, name: str, recipe: Recipe, like: torch.Tensor) -> Node:
    """A weight made from others, as an input; `like` says its shape and dtype."""
    name = _unused(program, name)
    program.recipes[name] = recipe
    return add_input(program, name, "weight", like)


def through(node: object, *targets: object) -> Node | None:
    """`node`, or what stands behind it where it is one of `targets` (a view, a cast)."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in targets:
        node = node.args[0]
    return node if isinstance(node, Node) else None


def item(program: Program, at: Node, source: Node, index: int) -> Node:
    """Output `index` of a node with several."""
    with program.graph.inserting_before(at):
        node = program.graph.call_function(operator.getitem, (source, index))
    node.meta["val"] = source.meta["val"][index]
    node.meta[KEY] = facts(source)
    return node
