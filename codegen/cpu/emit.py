"""What the library has no kernel for, as C++: loop nests printed from the graph, chains inlined."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from dcompile.codegen.cpu.indexing import abi_size, c_size, indices_of, linear, reshaped
from dcompile.codegen.cpu.pointwise import (
    BINARY,
    CTYPE,
    UNARY,
    arithmetic,
    formula,
    literal,
    op_name,
)
from dcompile.codegen.launches import RESHAPE, Argument, Int, Launch, Value, base
from dcompile.ir import operators
from dcompile.ir.edit import value
from dcompile.ir.program import Program
from dcompile.ir.show import SHORT, show_node
from dcompile.ir.sizes import shape_of, size_of

aten = torch.ops.aten

# name: (start, step); {v} the element, {acc} the running value
REDUCE = {
    aten.sum.dim_IntList: ("0", "{acc} += {v};"),
    aten.mean.dim: ("0", "{acc} += {v};"),
    aten.amax.default: ("LOWEST", "{acc} = most<T>({v}, {acc});"),
    aten.amin.default: ("HIGHEST", "{acc} = least<T>({v}, {acc});"),
    aten.any.dim: ("false", "{acc} |= (bool)({v});"),
    aten.all.dim: ("true", "{acc} &= (bool)({v});"),
}
REMAPS = {aten.slice.Tensor, aten.permute.default, aten.expand.default}


def can_emit(node: Node) -> bool:
    """Whether this module can print the node."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    val = value(node)
    if val.dtype not in CTYPE:
        return False
    target, name = node.target, op_name(node)
    if target in REDUCE:
        wide = val.dtype not in (torch.float64,)
        return wide and isinstance(node.args[1], (list, tuple, int))
    if target is aten.index.Tensor:
        _, indices = node.args
        return all(i is not None and value(i).dtype == torch.int64 for i in indices)  # type: ignore
    if target is aten.index_put.default:
        accumulate = len(node.args) > 3 and node.args[3]
        return not accumulate and _is_state(node.args[0])
    if target is operators.WRITE_ROWS:
        return _is_state(node.args[0])
    if target in REMAPS:
        return target is not aten.slice.Tensor or len(node.args) == 4
    if target in (
        aten.cat.default,
        aten._to_copy.default,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.masked_fill.Scalar,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.bitwise_not.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.index_select.default,
        aten.unsqueeze.default,
    ):
        return target is not aten.unsqueeze.default
    if torch.float64 in _dtypes(node):
        return False
    if name in ("add", "sub", "div", "rsub", "gelu"):
        return "rounding_mode" not in node.kwargs
    return name in UNARY or name in BINARY


def _is_state(node: object) -> bool:
    return isinstance(node, Node) and node.op == "placeholder"


def _dtypes(node: Node) -> set[torch.dtype]:
    values = (n.meta["val"] for n in (node, *node.all_input_nodes))
    return {v.dtype for v in values if isinstance(v, torch.Tensor)}


@dataclass
class Group:
    """Nodes that one emitted function computes, in order."""

    nodes: list[Node] = field(default_factory=list)


def emit_group(program: Program, group: Group, name: str, needed: set[Node]) -> tuple[str, Launch]:
    """C++ source of one function, and its launch; `needed` are the nodes read outside the group."""
    return _Emitter(program, group, name, needed).run()


class _Emitter:
    def __init__(self, program: Program, group: Group, name: str, needed: set[Node]) -> None:
        self.program = program
        self.name = name
        self.nodes = group.nodes
        self.inside = set(group.nodes)
        self.stored = {n for n in group.nodes if self._is_stored(n, needed)}
        self.buffers: dict[Node, int] = {}
        self.lines: list[str] = []

    def _is_stored(self, node: Node, needed: set[Node]) -> bool:
        if node in needed or node.target in REDUCE:
            return True
        if node.target in (aten.index_put.default, operators.WRITE_ROWS, aten.index.Tensor):
            return True
        readers = [u for u in _readers(node) if u in self.inside]
        return len(readers) > 1 and node.target not in REMAPS

    def run(self) -> tuple[str, Launch]:
        updates: list[Node] = []
        for node in self.nodes:
            if node not in self.stored:
                continue
            self.lines.append(f"  // {show_node(node, self.program)}")
            if node.target in (aten.index_put.default, operators.WRITE_ROWS):
                updates.append(self._scatter(node))
            elif node.target in REDUCE:
                self._reduce(node)
            else:
                self._loop(node, node, self.element(node, indices_of(self.shape(node))))
        writes = [
            n for n in self.nodes if n in self.stored and n in self.buffers and n not in updates
        ]
        writes = [
            n for n in writes if n.target not in (aten.index_put.default, operators.WRITE_ROWS)
        ]
        pointers = [
            f"  auto *const b{i} = ({CTYPE[value(n).dtype]} *)a[{i}].p;"
            for n, i in self.buffers.items()
        ]
        count = len(self.buffers)
        sizes = f"  const int64_t R = a[{count}].i, B = a[{count + 1}].i;\n  (void)R, (void)B;"
        body = "\n".join([*pointers, sizes, *self.lines])
        source = f"EXPORT void {self.name}(const Arg *a) {{\n{body}\n}}\n"
        args: list[Argument] = [Value(n) for n in self.buffers]
        args += [Int({"R": 1}), Int({"B": 1})]
        launch = Launch(
            "native", self.name, self.nodes[-1], args, writes, updates, list(self.nodes)
        )
        launch.touches = self._touches(writes, updates)
        return source, launch

    def _touches(self, writes: list[Node], updates: list[Node]) -> str:
        """The arguments with their extents, and what the numbers used as indices must be below."""
        below = self._indexed()
        words = []
        for node, i in self.buffers.items():
            mode = ">" if node in writes else "*" if node in updates else ""
            extent = ",".join(abi_size(s) for s in shape_of(value(node), self.program.symbols))
            bound = f"<{below[node]}" if node in below and not mode else ""
            source = _copied(node)
            values = f"=b{self.buffers[source]}" if mode == ">" and source in self.buffers else ""
            words.append(f"{mode}b{i}:{SHORT[value(node).dtype]}[{extent}]{bound}{values}")
        return " ".join([*words, "R", "B"])

    def _indexed(self) -> dict[Node, str]:
        found: dict[Node, str] = {}
        for node in self.nodes:
            if node.target is aten.index_select.default:
                pairs = [(node.args[2], value(node.args[0]).shape[node.args[1]])]
            elif node.target in (aten.index.Tensor, aten.index_put.default):
                pairs = list(zip(node.args[1], value(node.args[0]).shape, strict=False))
            elif node.target is operators.WRITE_ROWS:
                pairs = list(zip(node.args[2:], value(node.args[0]).shape, strict=False))
            else:
                continue
            for index, dim in pairs:
                found[base(index)] = abi_size(size_of(dim, self.program.symbols))
        return found

    def shape(self, node: Node) -> list[str]:
        return [c_size(s) for s in shape_of(value(node), self.program.symbols)]

    def pointer(self, node: Node) -> str:
        return f"b{self.buffers.setdefault(node, len(self.buffers))}"

    def _loop(self, node: Node, at: Node, text: str) -> None:
        shape = self.shape(node)
        store = f"st({self.pointer(at)} + {linear(indices_of(shape), shape)}, {text});"
        self._nest(shape, [store])

    def _nest(self, shape: list[str], body: list[str], extra: str = "") -> None:
        work = " * ".join([*shape, extra] if extra else shape) or "1"
        indent = "  "
        if shape:
            self.lines.append(f"{indent}#pragma omp parallel for if ({work} > 32768)")
        for i, size in enumerate(shape):
            self.lines.append(f"{indent}for (int64_t i{i} = 0; i{i} < {size}; ++i{i})")
            indent += "  "
        self.lines.append(indent + "{ " + " ".join(body) + " }")

    def _reduce(self, node: Node) -> None:
        x = node.args[0]
        assert isinstance(x, Node)
        dims_arg = node.args[1]
        rank = value(x).dim()
        dims = [d % rank for d in (dims_arg if isinstance(dims_arg, (list, tuple)) else [dims_arg])]  # type: ignore
        if not dims:
            dims = list(range(rank))
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        shape = self.shape(x)
        out_shape = self.shape(node)
        outer = iter(indices_of(out_shape)) if not keep else None
        index = []
        for d in range(rank):
            if d in dims:
                index.append(f"r{d}")
            else:
                index.append(f"i{d}" if keep else next(outer))  # type: ignore[arg-type]
        kind = arithmetic(value(node).dtype)
        start, step = REDUCE[node.target]
        limits = "std::numeric_limits<T>"
        lowest = f"-{limits}::infinity()" if kind == "float" else f"{limits}::lowest()"
        highest = f"{limits}::infinity()" if kind == "float" else f"{limits}::max()"
        start = {"LOWEST": lowest, "HIGHEST": highest}.get(start, start)
        body = [f"using T = {kind}; T acc = {start};"]
        for d in dims:
            body.append(f"for (int64_t r{d} = 0; r{d} < {shape[d]}; ++r{d})")
        body.append("{ " + step.format(acc="acc", v=self.load(x, index)) + " }")
        result = "acc"
        if node.target is aten.mean.dim:
            result = f"acc / (float)({' * '.join(shape[d] for d in dims)})"
        place = linear(indices_of(out_shape), out_shape)
        body.append(f"st({self.pointer(node)} + {place}, {result});")
        self._nest(out_shape, body, " * ".join(shape[d] for d in dims))

    def _scatter(self, node: Node) -> Node:
        """cache[row_seq, row_pos] = rows, in place; the state that it changes."""
        if node.target is operators.WRITE_ROWS:
            state, rows, *indices = node.args
        else:
            state, indices, rows = node.args[:3]  # type: ignore[assignment]
        assert isinstance(state, Node) and isinstance(rows, Node)
        shape, own = self.shape(rows), self.shape(state)
        index = indices_of(shape)
        lead = max(value(i).dim() for i in indices)  # type: ignore[arg-type]
        place = [self._broadcast(i, index[:lead], shape[:lead]) for i in indices] + index[lead:]  # type: ignore
        target = linear(place, own)
        self._nest(shape, [f"st({self.pointer(state)} + {target}, {self.load(rows, index)});"])
        self.buffers.setdefault(state, len(self.buffers))
        return state

    def _broadcast(self, node: Node, index: list[str], shape: list[str]) -> str:
        """Element of `node`, broadcast to `shape`, at `index`."""
        own = self.shape(node)
        tail = index[len(index) - len(own) :]
        return self.load(node, ["0" if s == "1" else i for s, i in zip(own, tail, strict=True)])

    def load(self, node: Node, index: list[str]) -> str:
        """A C expression for the element at `index`."""
        shape = self.shape(node)
        root = base(node)
        if root not in self.inside or root in self.stored:
            return f"ld({self.pointer(root)} + {linear(index, shape)})"
        return self.element(node, index)

    def element(self, node: Node, index: list[str]) -> str:
        """A C expression that computes the element at `index`."""
        target, args = node.target, node.args
        if target is RESHAPE:
            source = args[0]
            assert isinstance(source, Node)
            return self.load(source, reshaped(index, self.shape(node), self.shape(source)))
        if target is aten.permute.default:
            order = args[1]
            back = [""] * len(index)
            for i, d in enumerate(order):  # type: ignore[arg-type]
                back[d] = index[i]
            return self.load(args[0], back)  # type: ignore[arg-type]
        if target is aten.slice.Tensor:
            dim, start = args[1:3]
            moved = [f"({x} + {start})" if d == dim and start else x for d, x in enumerate(index)]
            return self.load(args[0], moved)  # type: ignore[arg-type]
        if target is aten.cat.default:
            return self._cat(node, index)
        if target is aten.index.Tensor:
            x, indices = args
            lead = max(value(i).dim() for i in indices)  # type: ignore
            shape = self.shape(node)
            place = [self._broadcast(i, index[:lead], shape[:lead]) for i in indices]  # type: ignore
            return self.load(x, place + index[lead:])  # type: ignore[arg-type]
        if target is aten.index_select.default:
            x, dim, rows = args
            chosen = self.load(rows, [index[dim]])  # type: ignore
            return self.load(x, [chosen if d == dim else i for d, i in enumerate(index)])  # type: ignore
        shape = self.shape(node)

        def arg(x: object, kind: str | None = None) -> str:
            if not isinstance(x, Node):
                return literal(x, kind)
            text = self._broadcast(x, index, shape)
            return text if kind is None else f"({kind})({text})"

        return formula(node, arg)

    def _cat(self, node: Node, index: list[str]) -> str:
        parts = node.args[0]
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(index)  # type: ignore
        text, start = "", 0
        ends = []
        for part in parts:  # type: ignore
            size = int(value(part).shape[dim])
            moved = [f"({i} - {start})" if d == dim and start else i for d, i in enumerate(index)]
            ends.append((start + size, self.load(part, moved)))
            start += size
        text = ends[-1][1]
        for end, part in reversed(ends[:-1]):
            text = f"({index[dim]} < {end} ? {part} : {text})"
        return text


def _copied(node: Node) -> Node | None:
    """The value whose elements are a gather's, as they are."""
    if node.target in (aten.index.Tensor, aten.index_select.default):
        return base(node.args[0])
    return None


def _readers(node: Node) -> list[Node]:
    """Who reads the value, seen through reshapes."""
    out: list[Node] = []
    for user in node.users:
        out.extend(_readers(user) if user.target is RESHAPE else [user])
    return out
