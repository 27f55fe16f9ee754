"""The planned program as a module over batches of sequences, for formats that know no rows.

Axes: N sequences, L positions a sequence, W positions computed of each, n positions a block, R = N W rows in
the order of sequences.  Two entries:

window: computes the positions that it is given, over keys and values that come in and go out.
full: computes every position and keeps nothing.

Output `new.X` is the input X of the next iteration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.fx.node import map_aggregate

from dcompile.errors import UnsupportedModel
from dcompile.export.source import Source
from dcompile.ir import operators
from dcompile.ir.show import target_name
from dcompile.ir.sizes import evaluate
from dcompile.ir.stored import StoredInput, StoredProgram
from dcompile.step.trace import fake_weights

aten = torch.ops.aten
Entry = Literal["window", "full"]
ENTRIES: tuple[Entry, ...] = ("window", "full")
NEW = "new."  # before the name of the state that an output becomes
CLOCKS = ("iteration", "entered", "temperature", "seed", "tick")
# What the program reads of rows and blocks; the module makes these from positions.
_MADE = ("row_seq", "row_pos", "row_limit", "block_seq", "block_pos", "choice_row")
_SPLIT = {
    operators.VOCAB_CHOICE: operators.CHOOSE,
    operators.VOCAB_CHOICE_ASKED: operators.CHOOSE_ASKED,
}
# The fused operators in ATen alone, without a shape or a branch that depends on data.
BODIES: Mapping[object, Callable[..., object]] = {
    o.overload: o.body for o in operators.OPERATORS if o.body is not None
}
WITHOUT_BODY: Mapping[object, str] = {
    operators.VOCAB_CHOICE: "split into the projection and choose",
    operators.VOCAB_CHOICE_ASKED: "split into the projection and choose_asked",
    operators.SOFT_EMBED: "of --smoothing, which carries rows from one iteration to the next",
    operators.VOCAB_SOFT_EMBED: "of --smoothing, which carries rows from one iteration to the next",
    operators.ROUTE_LIMITED: "of --moe-capacity and --expert-pool, whose limits depend on all rows",
}
# Example sizes, different from each other and from common model sizes.
_BATCH, _LENGTH, _WINDOW = 3, 47, 19


@dataclass(frozen=True)
class Port:
    """An input or output of the exported step: its name and the names of its moving axes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]  # "batch", "length", "window"


@dataclass(frozen=True)
class Portable:
    """The exported step: weights first, then `inputs`; the graph returns `outputs`."""

    exported: ExportedProgram
    weights: tuple[StoredInput, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]


def portable(source: Source, entry: Entry, dtype: torch.dtype) -> Portable:
    """Export one entry with symbolic batch, length and window; no weight is read.

    Floating values of the program's own dtype are computed in `dtype`.
    """
    step = BatchStep(source, entry, dtype)
    with fake_weights(), torch.no_grad():
        fixed = [torch.empty(_shape(i), dtype=step.widened(i.dtype)) for i in step.weights]
        given, shapes = step.example(source.program.sizes["L"])
        exported = torch.export.export(
            step,
            (*fixed, *given),
            dynamic_shapes=((*(None for _ in fixed), *shapes),),
            strict=False,
        )
    _drop_checks(exported)
    return Portable(exported, tuple(step.weights), tuple(step.ports), tuple(step.outputs))


class BatchStep(nn.Module):
    """Called with the weights and then `ports`, returns `outputs`, each in its order."""

    def __init__(
        self,
        source: Source,
        entry: Entry,
        dtype: torch.dtype,
        bodies: Mapping[object, Callable[..., object]] | None = None,
    ) -> None:
        super().__init__()
        self.bodies = bodies or {}
        program = source.program
        self.windowed = entry == "window"
        self.shift = bool(source.model["shift"])
        self.span = program.model_block
        self.narrow, self.dtype = source.dtype, dtype
        self.names = [i.name for i in program.inputs]
        self.graph = self._graph(program)
        kept = {i.name: i for i in program.inputs if i.kind in ("state", "step")}
        if "row_pos" not in kept or "canvas" not in kept:
            raise UnsupportedModel(
                "the program was not planned for rows: a pass was left out",
                remedy="compile without --skip and --stop-after",
            )
        self.weights = [i for i in program.inputs if i.kind in ("weight", "constant")]
        self.caches = {n: i for n, i in kept.items() if re.fullmatch(r"(keys|values)_\d+", n)}
        self.ports = list(self._ports(kept, program.sizes["n"]))
        self.returned = [self.windowed or o.state not in self.caches for o in program.outputs]
        named = [
            _dotted(o.name) if o.state is None else NEW + _dotted(o.state) for o in program.outputs
        ]
        self.outputs = [n for n, kept in zip(named, self.returned, strict=True) if kept]
        self.outputs.append("logits")

    def example(self, longest: int) -> tuple[list[Tensor], list[dict[int, Any]]]:
        """Zeros for the ports, and which of their axes move."""
        moving = {
            "batch": Dim("batch", min=1),
            "length": Dim("length", min=1, max=longest),
            "window": Dim("window", min=1, max=longest),
        }
        sizes = {"batch": _BATCH, "length": min(_LENGTH, longest), "window": min(_WINDOW, longest)}
        given = [
            torch.zeros([sizes[d] if isinstance(d, str) else d for d in p.shape], dtype=p.dtype)
            for p in self.ports
        ]
        shapes = [
            {i: moving[d] for i, d in enumerate(p.shape) if isinstance(d, str)} for p in self.ports
        ]
        return given, shapes

    def widened(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if dtype == self.narrow else dtype

    def _ports(self, kept: Mapping[str, StoredInput], n: int) -> Sequence[Port]:
        whole = torch.int64
        out = [Port("canvas", whole, ("batch", "length")), Port("lengths", whole, ("batch",))]
        if self.windowed:
            out.append(Port("positions", whole, ("batch", "window")))
        out.append(Port("block_positions", whole, ("batch", n)))
        known = {*_MADE, "canvas", *self.caches}
        clocks = [Port(c, kept[c].dtype, ("batch",)) for c in CLOCKS if c in kept]
        rest = [i for name, i in kept.items() if name not in known and name not in CLOCKS]
        states = [i for i in rest if i.kind == "state"]
        for item in (i for i in rest if i.kind == "step"):
            clocks.append(Port(item.name, item.dtype, ("batch",)))
        for item in [*(self.caches.values() if self.windowed else ()), *states]:
            axes: list[int | str] = ["batch", *(evaluate(d, {}) for d in item.shape[1:])]
            if item.name in self.caches:
                axes[1] = "length"
            clocks.append(Port(_dotted(item.name), self.widened(item.dtype), tuple(axes)))
        return [*out, *clocks]

    def _graph(self, program: StoredProgram) -> torch.fx.GraphModule:
        """The program's graph, in the wanted dtype, with the logits as one more output."""
        graph = torch.fx.Graph()
        result = graph.graph_copy(program.module.graph, {})
        logits = None
        for node in [n for n in graph.nodes if n.target in _SPLIT]:
            _split(graph, node)
        for node in graph.nodes:
            if node.target in _SPLIT.values():
                logits = node.args[0]
            _known(node)
            if node.target in self.bodies:
                node.target = self.bodies[node.target]
            node.args = map_aggregate(node.args, self._cast)
            node.kwargs = map_aggregate(node.kwargs, self._cast)
        if logits is None:
            raise UnsupportedModel("the program chooses no tokens")
        graph.output((*result, logits))  # type: ignore[misc]
        return torch.fx.GraphModule({}, graph)

    def _cast(self, argument: Any) -> Any:
        return self.widened(argument) if isinstance(argument, torch.dtype) else argument

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        weights = {i.name: x for i, x in zip(self.weights, given, strict=False)}
        names = [p.name for p in self.ports]
        at = {n: x for n, x in zip(names, given[len(weights) :], strict=True)}
        canvas, lengths = at["canvas"], at["lengths"]
        batch, length = canvas.shape
        place = torch.arange(length)
        positions = at["positions"] if self.windowed else place[None].expand(batch, length)
        window = positions.shape[1]
        sequence = torch.arange(batch)
        block = at["block_positions"]
        wanted = (block - 1).clamp_min(0) if self.shift else block
        choice = wanted
        if self.windowed:
            choice = (positions[:, None] == wanted[:, :, None]).float().argmax(-1)
        limit = lengths[:, None].expand(batch, window)
        if self.span is not None:
            limit = torch.minimum((positions // self.span + 1) * self.span, limit)
        made = {
            "row_seq": sequence[:, None].expand(batch, window).reshape(-1),
            "row_pos": positions.reshape(-1),
            "row_limit": limit.reshape(-1),
            "block_seq": sequence,
            "block_pos": block,
            "choice_row": choice + sequence[:, None] * window,
        }
        if not self.windowed:
            for name, item in self.caches.items():
                heads = [evaluate(d, {}) for d in item.shape[2:]]
                made[name] = torch.zeros((batch, length, *heads), dtype=self.widened(item.dtype))
        ready = {**weights, **{_plain(n): x for n, x in at.items()}, **made}
        *out, logits = self.graph(*(ready[name] for name in self.names))
        kept = [x for x, wanted in zip(out, self.returned, strict=True) if wanted]
        return *kept, logits.reshape(*block.shape, -1).float()


def _known(node: Node) -> None:
    """Refuse an operator of ours that no export has a body for."""
    own = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dcompile"
    if own and node.target not in BODIES and node.target not in _SPLIT:
        raise UnsupportedModel(
            f"the step has an operator that no export knows: {target_name(node)}",
            where=node.name,
            remedy=f"compile without it: it is {WITHOUT_BODY.get(node.target, 'not exported')}",
        )


def _split(graph: torch.fx.Graph, node: Node) -> None:
    """vocab_choice(x, w, b, ...) -> choose(linear(x, w, b), ...)"""
    x, weight, bias, *rest = node.args
    with graph.inserting_before(node):
        logits = graph.call_function(aten.linear.default, (x, weight, bias))
        chosen = graph.call_function(_SPLIT[node.target], (logits, *rest))  # type: ignore[index]
    node.replace_all_uses_with(chosen)
    graph.erase_node(node)


def _drop_checks(exported: ExportedProgram) -> None:
    """Remove export's assertions on sizes, and casts that change nothing."""
    graph = exported.graph
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and "assert" in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _shape(item: StoredInput) -> list[int]:
    return [evaluate(size, {}) for size in item.shape]


def _dotted(name: str) -> str:
    """keys_3 -> keys.3"""
    return re.sub(r"^(keys|values)_(\d+)$", r"\1.\2", name)


def _plain(name: str) -> str:
    return name.replace(".", "_")
