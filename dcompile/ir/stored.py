"""A program's graph as JSON and back, so that an artifact can hold it without any code.

Only what `ir/contract.py` allows can be said: calls of ATen and dcompile operators, and getitem.
Reading looks operators up by name in those two libraries, and evaluates nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from dcompile.errors import ArtifactError
from dcompile.ir import operators  # noqa: F401  (registers the operators that a stored graph names)
from dcompile.ir.edit import value
from dcompile.ir.meta import facts
from dcompile.ir.program import Kind, Program
from dcompile.ir.show import SHORT
from dcompile.ir.sizes import Size, shape_of

VERSION = 1
LIBRARIES = ("aten", "dcompile")
DTYPES = {name: dtype for dtype, name in SHORT.items()}
_REMEDY = "compile the model again"


@dataclass(frozen=True)
class StoredInput:
    """A placeholder: its shape in the symbols R and B; of a weight or constant, where it is held."""

    name: str
    kind: Kind
    dtype: torch.dtype
    shape: tuple[Size, ...]
    tensor: str | None = None  # its name among the artifact's tensors
    layout: str = "plain"  # or packed, experts: codegen/pack.py


@dataclass(frozen=True)
class StoredOutput:
    """A returned value; `state` names the input that it becomes."""

    name: str
    state: str | None


@dataclass
class StoredProgram:
    """What a stored graph says: enough to run or to export it, not to compile it again."""

    module: GraphModule
    inputs: tuple[StoredInput, ...]
    outputs: tuple[StoredOutput, ...]
    sizes: Mapping[str, int]  # N, L, n: as compiled
    model_block: int | None

    def input(self, name: str) -> StoredInput:
        return next(i for i in self.inputs if i.name == name)


def dump(program: Program, held: Iterable[tuple[str, str, str]] = ()) -> dict[str, Any]:
    """A planned program as JSON; `held` is (tensor, input, layout) of each stored weight."""
    places = {name: (tensor, layout) for tensor, name, layout in held}
    inputs = []
    for item in program.inputs:
        like = value(program.placeholder(item.name))
        text: dict[str, Any] = {
            "name": item.name,
            "kind": item.kind,
            "dtype": SHORT[like.dtype],
            "shape": shape_of(like, program.symbols),
        }
        if item.name in places:
            text["tensor"], text["layout"] = places[item.name]
        inputs.append(text)
    shape = program.shape
    (returned,) = program.result().args
    return {
        "version": VERSION,
        "sizes": {"N": shape.slots, "L": shape.positions, "n": shape.block_length},
        "model_block": shape.model_block,
        "inputs": inputs,
        "nodes": [_node(n) for n in program.graph.nodes if n.op == "call_function"],
        "returned": _argument(list(returned)),  # type: ignore[arg-type]
        "outputs": [{"name": o.name, "state": o.state} for o in program.outputs],
    }


def _node(node: Node) -> dict[str, Any]:
    out: dict[str, Any] = {
        "name": node.name,
        "call": _target(node),
        "args": [_argument(a) for a in node.args],
    }
    if node.kwargs:
        out["kwargs"] = {key: _argument(a) for key, a in node.kwargs.items()}
    if origin := facts(node).origin:
        out["origin"] = origin
    return out


def _target(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    assert isinstance(node.target, torch._ops.OpOverload)
    return str(node.target)


def _argument(argument: object) -> Any:
    match argument:
        case Node():
            return {"node": argument.name}
        case None | bool() | int() | str():
            return argument
        case float():
            return argument if math.isfinite(argument) else {"float": repr(argument)}
        case list() | torch.fx.immutable_collections.immutable_list():
            return [_argument(a) for a in argument]
        case tuple():
            return {"tuple": [_argument(a) for a in argument]}
        case torch.dtype():
            return {"dtype": SHORT[argument]}
        case torch.device():
            return {"device": argument.type}
        case torch.layout() | torch.memory_format():
            return {"torch": str(argument).removeprefix("torch.")}
    raise AssertionError(f"no argument of a program: {argument!r}")


def load(text: Mapping[str, Any], where: str) -> StoredProgram:
    """The program that `dump` wrote; raises ArtifactError where the text says anything else."""
    try:
        return _load(text)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        what = f"the stored program cannot be read: {type(error).__name__}: {error}"
        raise ArtifactError(what, where=where, remedy=_REMEDY) from error


def _load(text: Mapping[str, Any]) -> StoredProgram:
    if text["version"] != VERSION:
        raise ValueError(f"version {text['version']!r}, not {VERSION}")
    graph = Graph()
    nodes: dict[str, Node] = {}

    def named(name: str, node: Node) -> None:
        if name in nodes or not name.isidentifier():
            raise ValueError(f"no name for a value: {name!r}")
        node._rename(name)
        nodes[name] = node

    inputs = tuple(_input(item) for item in text["inputs"])
    for item in inputs:
        named(item.name, graph.placeholder(item.name))
        nodes[item.name].target = item.name
    for each in text["nodes"]:
        args = tuple(_value(a, nodes) for a in each["args"])
        kwargs = {key: _value(a, nodes) for key, a in each.get("kwargs", {}).items()}
        named(each["name"], graph.call_function(_operator(each["call"]), args, kwargs))
    graph.output(tuple(_value(a, nodes) for a in text["returned"]))
    outputs = tuple(StoredOutput(o["name"], o["state"]) for o in text["outputs"])
    if len(outputs) != len(text["returned"]):
        raise ValueError("as many outputs as returned values")
    sizes = {name: int(text["sizes"][name]) for name in ("N", "L", "n")}
    return StoredProgram(GraphModule({}, graph), inputs, outputs, sizes, text["model_block"])


def _input(item: Mapping[str, Any]) -> StoredInput:
    if item["kind"] not in ("weight", "constant", "state", "step"):
        raise ValueError(f"an input of kind {item['kind']!r}")
    return StoredInput(
        item["name"],
        item["kind"],
        DTYPES[item["dtype"]],
        tuple(item["shape"]),
        item.get("tensor"),
        item.get("layout", "plain"),
    )


def _operator(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    library, packet, overload = name.split(".")
    if library not in LIBRARIES:
        raise ValueError(f"an operator of {library!r}")
    found = getattr(getattr(getattr(torch.ops, library), packet), overload)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        raise ValueError(f"no operator of a program: {name!r}")
    return found


def _value(text: Any, nodes: Mapping[str, Node]) -> Any:
    if isinstance(text, list):
        return [_value(a, nodes) for a in text]
    if not isinstance(text, dict):
        return text
    ((kind, said),) = text.items()
    match kind:
        case "node":
            return nodes[said]
        case "float":
            return float(said)
        case "tuple":
            return tuple(_value(a, nodes) for a in said)
        case "dtype":
            return DTYPES[said]
        case "device":
            return torch.device(said)
        case "torch":
            found = getattr(torch, said)
            assert isinstance(found, (torch.layout, torch.memory_format)), said
            return found
    raise ValueError(f"an argument of kind {kind!r}")
