"""Which kernel family computes an operator, over which operands, and which nodes it takes along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.fx import Node

from dcompile.codegen.cuda.epilogues import Epilogue, find_epilogue, only_reader
from dcompile.codegen.kernels import (
    attend,
    gather,
    linear,
    moe_ffn,
    norm_rope_write,
    norms,
    route,
    route_limited,
    silu_mul,
    soft_embed,
    vocab_choice,
)
from dcompile.codegen.launches import Value, all_outputs, strided
from dcompile.codegen.triton.variant import Expression, Lowering
from dcompile.errors import UnsupportedModel
from dcompile.ir import operators
from dcompile.ir.edit import add_weight, fake_mode, value
from dcompile.ir.program import Program
from dcompile.ir.show import SHORT, show_node
from dcompile.ir.sizes import elements, shape_of
from dcompile.ir.weights import Stack

aten = torch.ops.aten
RESHAPE, CAST = aten.reshape.default, aten._to_copy.default
FLOATS = ("f32", "bf16", "f16")
EMITTED = "emitted"  # the module of what is printed for one plan
CONTEXT_ROWS = 32  # of one sequence that usually run together, where blocks are not longer


@dataclass
class Site:
    """An operator with its launches: `results` are new values, `updates` states changed in place."""

    lowering: Lowering
    operands: dict[str, Value]
    results: list[Node]
    covers: list[Node]  # the nodes that it stands for; the last is where it runs
    updates: list[Node] = field(default_factory=list)
    make: Callable[..., Lowering] | None = None
    """The lowering once more, with `smaller` tiles; None where there are none to choose."""


@dataclass
class Families:
    """Chooses for one program; `arch` is the architecture whose tiles are used."""

    program: Program
    arch: int
    taken: set[Node] = field(default_factory=set)  # nodes that a site stands for
    functions: dict[str, str] = field(default_factory=dict)  # printed epilogues: name -> source

    def sites(self) -> dict[Node, Site]:
        """The sites of the program, by the node at which each runs."""
        found: dict[Node, Site] = {}
        # What takes most along comes first: an operator is of one site.
        for targets in (*FIRST, tuple(TABLE)):
            for node in self.program.calls(*targets):
                if node in self.taken:
                    continue
                site = self.site(node)
                if site is not None and not self.taken & set(site.covers):
                    self.taken |= set(site.covers)
                    found[site.covers[-1]] = site
        return found

    def function(self, epilogue: Epilogue) -> str:
        """The name of a printed function, as a kernel takes it."""
        for name, body in self.functions.items():
            if code_of(body) == code_of(epilogue.body):
                return f"{EMITTED}:{name}"
        stem = f"{epilogue.name}_epilogue"
        count = sum(name.startswith(stem) for name in self.functions)
        name = f"{stem}_{count}" if count else stem
        self.functions[name] = epilogue.body
        return f"{EMITTED}:{name}"

    def site(self, node: Node) -> Site | None:
        """How a family computes the node; None where no family does."""
        chooser = TABLE.get(node.target)
        return chooser(self, node) if chooser is not None else None

    def rows(self, x: Node, inner: int = 1) -> Expression:
        """How many rows a value has when its last `inner` axes are one row."""
        shape = shape_of(value(x), self.program.symbols)
        return elements(shape[: len(shape) - inner])

    def refuse(self, node: Node, why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"no CUDA kernel computes this operator: {why}",
            where=show_node(node, self.program),
            remedy="--target cpu, which falls back to torch for it",
        )


def code_of(source: str) -> str:
    """Source without its comments: equal code is one function."""
    return "\n".join(x for x in source.splitlines() if not x.strip().startswith("#"))


def short(*nodes: object) -> str | None:
    """The one dtype of the tensors among `nodes`, where it is a float that kernels take."""
    dtypes = {SHORT[value(n).dtype] for n in nodes if isinstance(n, Node)}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(FLOATS) else None


def behind(node: object, *targets: object) -> tuple[Node, list[Node]]:
    """What stands behind reshapes and `targets`, and the nodes that were passed."""
    passed: list[Node] = []
    while isinstance(node, Node) and node.target in (RESHAPE, *targets):
        passed.append(node)
        node = node.args[0]
    assert isinstance(node, Node)
    return node, passed


def operands(**named: object) -> dict[str, Value]:
    return {name: Value(n) for name, n in named.items() if isinstance(n, Node)}


def _embedding(f: Families, node: Node) -> Site | None:
    table, ids = node.args[:2]
    dtype = short(table)
    if dtype is None or value(ids).dtype != torch.int64:
        return None
    width = int(value(table).shape[1])
    canvas, passed = behind(ids)
    if canvas.target is aten.index.Tensor and len(canvas.args[1]) == 2:
        held, (seq, pos) = canvas.args
        if held.op == "placeholder" and value(held).dim() == 2 and value(seq).dim() == 1:
            lowering = gather.canvas_launches(
                rows=f.rows(node), positions=int(value(held).shape[1]), width=width, dtype=dtype
            )
            named = operands(out=node, table=table, canvas=held, row_seq=seq, row_pos=pos)
            along = [canvas, *passed] if only_reader(canvas) is node else []
            return Site(lowering, named, [node], [*along, node])
    lowering = gather.launches(rows=f.rows(node), width=width, dtype=dtype)
    return Site(lowering, operands(out=node, x=table, index=ids), [node], [node])


def _gather(f: Families, node: Node) -> Site | None:
    """Long rows of the first axis that is not 1; short ones are part of an emitted kernel."""
    if node.target is aten.index_select.default:
        x, axis, index = node.args
    else:
        x, (index, *rest) = node.args
        axis = 0
        if rest or index is None:
            return None
    dtype = short(x)
    row = [int(d) for d in value(x).shape[axis + 1 :]]
    width = elements([*row, 1])
    if dtype is None or any(d != 1 for d in value(x).shape[:axis]) or width < 32:
        return None
    lowering = gather.launches(rows=f.rows(index, 0), width=width, dtype=dtype)
    return Site(lowering, operands(out=node, x=x, index=index), [node], [node])


def _rms_norm(f: Families, node: Node) -> Site | None:
    x, shape, weight, eps = (*node.args, None, None)[:4]
    dtype = short(x)
    if dtype is None or len(shape) != 1 or eps is None or SHORT[value(node).dtype] != dtype:
        return None
    lowering = norms.launches(
        rows=f.rows(x),
        hidden=int(shape[0]),
        dtype=dtype,
        eps=float(eps),
        weighted=weight is not None,
        weight_dtype=SHORT[value(weight).dtype] if weight is not None else None,
    )
    return Site(lowering, operands(y=node, x=x, w=weight), [node], [node])


def _add_rms_norm(f: Families, node: Node) -> Site | None:
    x, r, weight, eps = node.args
    dtype = short(x, r)
    if dtype is None:
        return None
    total, normed = all_outputs(f.program, node, 2)
    rows, along, index = f.rows(x), [], None
    for one, other in ((x, r), (r, x)):
        if (found := _picked(one, node)) is not None:
            (x, index), r, along = found, other, [one]
            break
    lowering = norms.launches(
        rows=rows,
        hidden=int(value(x).shape[-1]),
        dtype=dtype,
        eps=float(eps),
        weighted=weight is not None,
        add=True,
        weight_dtype=SHORT[value(weight).dtype] if weight is not None else None,
        chosen=index is not None,
    )
    named = operands(y=normed, total=total, x=x, r=r, w=weight, chosen=index)
    return Site(lowering, named, [total, normed], [*along, node])


def _picked(node: Node, reader: Node) -> tuple[Node, Node] | None:
    """(x, index) where the value is a choice of x's rows that nothing else reads."""
    if node.target is not aten.index_select.default or set(node.users) != {reader}:
        return None
    x, axis, index = node.args
    if any(d != 1 for d in value(x).shape[:axis]) or value(index).dtype != torch.int64:
        return None
    return x, index


def _linear(f: Families, node: Node) -> Site | None:
    x, weight, bias = (*node.args, None)[:3]
    dtype = short(x, weight, bias)
    if dtype is None:
        return None
    n, k = (int(d) for d in value(weight).shape)
    sizes = {"rows": f.rows(x), "n": n, "k": k, "dtype": dtype, "arch": f.arch}
    named = operands(y=node, x=x, w=weight, bias=bias)
    found = find_epilogue(f.program, node, f.taken)
    if found is None:
        make = partial(linear.launches, **sizes, bias=bias is not None)
        return Site(make(), named, [node], [node], make=make)
    make = partial(
        linear.launches,
        **sizes,
        bias=bias is not None,
        other=SHORT[value(found.other).dtype] if found.other is not None else None,
        epilogue=f.function(found),
        out_dtype=SHORT[value(found.result).dtype],
    )
    named |= operands(y=found.result, other=found.other)
    return Site(make(), named, [found.result], [node, *found.nodes], make=make)


def _silu_mul(f: Families, node: Node) -> Site | None:
    gate, up = node.args
    dtype = short(gate, up)
    if dtype is None:
        return None
    (g, g_at, g_stride), (u, u_at, u_stride) = strided(gate), strided(up)
    width = int(value(node).shape[-1])
    source, along = behind(g)
    halves = g is u and (g_at, u_at, g_stride) == (0, width, 2 * width)
    if halves and source.target is aten.linear.default and set(g.users) == {gate, up}:
        x, weight, bias = (*source.args, None)[:3]
        alone = all(len(n.users) == 1 for n in (gate, up, *along, *([source] if along else [])))
        if short(x, weight, bias) == dtype and alone:
            make = partial(
                linear.gated_launches,
                **{"rows": f.rows(node), "n": width, "k": int(value(x).shape[-1])},
                **{"dtype": dtype, "arch": f.arch, "bias": bias is not None},
            )
            named = operands(y=node, x=x, w=weight, bias=bias)
            return Site(make(), named, [node], [source, *along, gate, up, node], make=make)
    lowering = silu_mul.launches(
        rows=f.rows(node), width=width, dtype=dtype, gate_stride=g_stride, up_stride=u_stride
    )
    named = {"y": Value(node), "gate": Value(g, g_at), "up": Value(u, u_at)}
    taken = [n for n, s in ((gate, g), (up, u)) if n is not s and set(n.users) == {node}]
    return Site(lowering, named, [node], [*dict.fromkeys(taken), node])


def _norm_rope_write(f: Families, node: Node) -> Site | None:
    qkv, q_norm, k_norm, cos, sin, row_seq, row_pos, keys, values, heads, eps = node.args
    dtype = short(qkv, q_norm, k_norm, keys, values)
    if dtype is None or short(cos, sin) != "f32":
        return None
    q, *_ = all_outputs(f.program, node, 3)
    _, positions, groups, size = (int(d) for d in value(keys).shape)
    lowering = norm_rope_write.launches(
        rows=f.rows(row_seq, 0),
        heads=heads,
        groups=groups,
        size=size,
        positions=positions,
        rot=int(value(cos).shape[-1]),
        dtype=dtype,
        eps=float(eps),
        q_norm=q_norm is not None,
        k_norm=k_norm is not None,
    )
    named = operands(
        **{"q": q, "keys": keys, "values": values, "qkv": qkv, "q_norm": q_norm, "k_norm": k_norm},
        **{"cos": cos, "sin": sin, "row_seq": row_seq, "row_pos": row_pos},
    )
    return Site(lowering, named, [q], [node], [keys, values])


def _attend(f: Families, node: Node) -> Site | None:
    q, keys, values, row_seq, row_limit, scale = node.args
    dtype = short(q, keys, values)
    if dtype is None:
        return None
    _, positions, groups, size = (int(d) for d in value(keys).shape)
    picked = [_picked(n, node) for n in (q, row_seq, row_limit)]
    along: list[Node] = []
    index = None
    if all(p is not None for p in picked) and len({p[1] for p in picked}) == 1:
        along, index = [q, row_seq, row_limit], picked[0][1]
        q, row_seq, row_limit = (p[0] for p in picked)
    make = partial(
        attend.launches,
        rows=f.rows(node, 2),
        heads=int(value(q).shape[1]),
        groups=groups,
        size=size,
        positions=positions,
        dtype=dtype,
        scale=float(scale),
        arch=f.arch,
        window=min(CONTEXT_ROWS, f.program.shape.block_length),
        chosen=index is not None,
    )
    named = operands(
        **{"o": node, "q": q, "keys": keys, "values": values},
        **{"row_seq": row_seq, "row_limit": row_limit, "chosen": index},
    )
    return Site(make(), named, [node], [*along, node], make=make)


def _route(f: Families, node: Node) -> Site | None:
    logits, bias, top_k, score, groups, kept, renormalize, scale = node.args
    weights, experts = all_outputs(f.program, node, 2)
    how = {
        **{"rows": f.rows(logits), "num_experts": int(value(logits).shape[-1]), "top_k": top_k},
        **{"score": score, "groups": int(groups), "kept_groups": int(kept), "scale": float(scale)},
        **{"renormalize": bool(renormalize)},
        "bias": SHORT[value(bias).dtype] if bias is not None else None,
    }
    named = operands(weights=weights, experts=experts, bias=bias)
    product, along = behind(logits, CAST)
    alone = all(set(n.users) == {m} for n, m in zip(along, [node, *along], strict=False))
    # Rounded logits are what the cast widens; of a cast to less the kernel knows nothing.
    if product.target is aten.linear.default and alone and len(set(product.users)) == 1:
        x, weight, b = (*product.args, None)[:3]
        if value(logits).dtype == torch.float32 and short(x, weight, b) is not None:
            source: Node = x
            cast: list[Node] = []
            if value(x).dtype == torch.float32:
                source, cast = behind(x, CAST)
                if short(source) is None or any(len(n.users) > 1 for n in cast):
                    source, cast = x, []
            make = partial(
                route.product_launches,
                **{"hidden": int(value(x).shape[-1]), "product_bias": b is not None},
                **{"dtype": SHORT[value(source).dtype], "w_dtype": SHORT[value(weight).dtype]},
                **how,
            )
            named |= operands(x=source, w=weight, b=b)
            return Site(
                make(), named, [weights, experts], [*cast, product, *along, node], make=make
            )
    dtype = short(logits)
    if dtype is None:
        return None
    lowering = route.launches(dtype=dtype, **how)
    return Site(lowering, named | operands(logits=logits), [weights, experts], [node])


def _route_limited(f: Families, node: Node) -> Site | None:
    logits, bias, *places, top_k, score, groups, kept, renormalize = node.args[:11]
    scale, capacity, reroute, pool = node.args[11:]
    dtype = short(logits)
    if dtype is None:
        return None
    weights, experts = all_outputs(f.program, node, 2)
    lowering = route_limited.launches(
        **{"rows": f.rows(logits), "blocks": f.rows(places[2], 0), "slots": f.program.shape.slots},
        **{"block_length": int(value(places[3]).shape[-1]), "dtype": dtype},
        **{"num_experts": int(value(logits).shape[-1]), "top_k": top_k, "score": score},
        **{"groups": int(groups), "kept_groups": int(kept), "renormalize": bool(renormalize)},
        **{"scale": float(scale), "capacity": float(capacity), "pool": int(pool)},
        overflow_reroutes=bool(reroute),
        bias=SHORT[value(bias).dtype] if bias is not None else None,
    )
    named = operands(weights=weights, experts=experts, logits=logits, bias=bias)
    named |= operands(
        **dict(zip(("row_seq", "row_pos", "block_seq", "block_pos"), places, strict=True))
    )
    return Site(lowering, named, [weights, experts], [node])


def _soft_embed(f: Families, node: Node) -> Site | None:
    x, weight, bias, table, live, factor = node.args
    dtype = short(x, weight, bias, table)
    if dtype is None or SHORT[value(live).dtype] != "bool":
        return None
    vocab, hidden = (int(d) for d in value(weight).shape)
    make = partial(
        soft_embed.launches,
        **{"rows": f.rows(live, 0), "vocab": vocab, "hidden": hidden, "dtype": dtype},
        **{"width": int(value(table).shape[-1]), "arch": f.arch, "bias": bias is not None},
    )
    named = operands(y=node, x=x, w=weight, bias=bias, table=table, live=live, weight=factor)
    return Site(make(), named, [node], [node], make=make)


def _moe_ffn(f: Families, node: Node) -> Site | None:
    x, weights, experts, gate_up, down, gate_up_bias, down_bias, activation = node.args
    dtype = short(x, gate_up, down, gate_up_bias, down_bias)
    if dtype is None:
        return None
    if activation not in operators.ACTIVATIONS:
        raise f.refuse(node, f"the experts' activation is {activation!r}")
    count, hidden, width = (int(d) for d in value(down).shape)
    shared, out, along = 0, node, []
    found = _shared(node) if activation == "silu" and gate_up_bias is None else None
    if found is not None and _stackable(f.program, gate_up, down, found):
        gate_up, down = (
            _stacked(f.program, routed, one)
            for routed, one in ((gate_up, found.gate_up), (down, found.down))
        )
        shared, out, along = 1, found.sum, found.nodes
    make = partial(
        moe_ffn.launches,
        **{"rows": f.rows(x), "hidden": hidden, "width": width, "num_experts": count},
        **{"top_k": int(value(weights).shape[-1]), "dtype": dtype, "arch": f.arch},
        **{"activation": activation, "gate_up_bias": gate_up_bias is not None},
        **{"down_bias": down_bias is not None, "shared": shared},
        limited=any(True for _ in f.program.calls(operators.ROUTE_LIMITED)),
    )
    named = operands(
        **{"y": out, "x": x, "weights": weights, "experts": experts, "gate_up": gate_up},
        **{"down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias},
    )
    covers = sorted({node, out, *along}, key=list(f.program.graph.nodes).index)
    return Site(make(), named, [out], covers, make=make)


@dataclass(frozen=True)
class Shared:
    """A gated FFN of the same rows, added to what the experts give."""

    gate_up: Node
    down: Node
    sum: Node
    nodes: list[Node]


def _shared(node: Node) -> Shared | None:
    """moe_ffn(x) + W_d silu_mul(halves of W_gu x), read nowhere in between."""
    total = only_reader(node)
    if total is None or total.target is not aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return None
    sides = [behind(a) for a in total.args if isinstance(a, Node)]
    rest = [(n, passed) for n, passed in sides if n is not node]
    if len(sides) != 2 or len(rest) != 1:
        return None
    second, passed = rest[0]
    if second.target is not aten.linear.default or len(second.args) != 2:
        return None
    gated, between = behind(second.args[0])
    if gated.target is not operators.SILU_MUL:
        return None
    (g, g_at, _), (u, u_at, _) = strided(gated.args[0]), strided(gated.args[1])
    first, inside = behind(g)
    width = int(value(gated).shape[-1])
    if g is not u or (g_at, u_at) != (0, width) or first.target is not aten.linear.default:
        return None
    if len(first.args) != 2 or behind(first.args[0])[0] is not behind(node.args[0])[0]:
        return None
    chain = [second, *passed, gated, *between, first, *inside, *gated.args]
    known = {total, node, *chain, *behind(total.args[0])[1], *behind(total.args[1])[1]}
    if any(user not in known for n in chain for user in n.users):
        return None
    return Shared(first.args[1], second.args[1], total, [*chain, total])


def _stackable(program: Program, gate_up: Node, down: Node, found: Shared) -> bool:
    """Of the experts' shape and dtype, and made by recipes that can be stacked."""
    pairs = ((gate_up, found.gate_up), (down, found.down))
    return all(
        value(routed).shape[1:] == value(one).shape
        and value(routed).dtype == value(one).dtype
        and isinstance(program.recipes.get(routed.name), Stack)
        and one.name in program.recipes
        for routed, one in pairs
    )


def _stacked(program: Program, routed: Node, one: Node) -> Node:
    """The experts' weights with the shared one behind them, as a weight of its own."""
    recipe = Stack((*program.recipes[routed.name].parts, program.recipes[one.name]))
    with fake_mode(program):
        like = torch.cat((value(routed), value(one)[None]))
    return add_weight(program, f"{routed.name}_and_shared", recipe, like)


def _vocab_choice(f: Families, node: Node) -> Site | None:
    x, weight, bias, live, temperature, seed, tick, pos, *asked, mask_id = node.args
    dtype = short(x, weight, bias)
    if dtype is None:
        return None
    found = all_outputs(f.program, node, 7 if asked else 4)
    vocab, hidden = (int(d) for d in value(weight).shape)
    make = partial(
        vocab_choice.launches,
        **{"sequences": f.rows(temperature, 0), "length": int(value(live).shape[-1])},
        **{"hidden": hidden, "vocab": vocab, "mask_id": mask_id, "dtype": dtype, "arch": f.arch},
        **{"bias": bias is not None, "asked": int(value(asked[0]).shape[-1]) if asked else 0},
    )
    outputs = ("token", "confidence", "margin", "entropy", "choice_score", "probability", "score")
    named = operands(
        **dict(zip(outputs, found, strict=False)),
        **{"x": x, "w": weight, "bias": bias, "live": live, "temperature": temperature},
        **{"seed": seed, "tick": tick, "pos": pos, "asked": asked[0] if asked else None},
    )
    return Site(make(), named, list(found), [node], make=make)


FIRST = (
    (operators.MOE_FFN,),
    (operators.ROUTE,),
    (operators.SILU_MUL,),
    (operators.ATTEND, operators.ADD_RMS_NORM),
    (aten.embedding.default,),
)
Chooser = Callable[[Families, Node], Site | None]
TABLE: dict[object, Chooser] = {
    aten.embedding.default: _embedding,
    aten.rms_norm.default: _rms_norm,
    aten.linear.default: _linear,
    aten.index_select.default: _gather,
    aten.index.Tensor: _gather,
    operators.ADD_RMS_NORM: _add_rms_norm,
    operators.SILU_MUL: _silu_mul,
    operators.NORM_ROPE_WRITE: _norm_rope_write,
    operators.ATTEND: _attend,
    operators.ROUTE: _route,
    operators.ROUTE_LIMITED: _route_limited,
    operators.VOCAB_SOFT_EMBED: _soft_embed,
    operators.MOE_FFN: _moe_ffn,
    operators.VOCAB_CHOICE: _vocab_choice,
    operators.VOCAB_CHOICE_ASKED: _vocab_choice,
}
_LOGITS = "a kernel computes it together with the linear layer whose output the logits must be"
# How each of the others is computed.
WITHOUT_KERNEL: Mapping[object, str] = {
    operators.WRITE_ROWS: "it is printed where it writes into a state of the step",
    operators.CHOOSE: f"{_LOGITS}: vocab_choice, of fuse_vocab_choice",
    operators.CHOOSE_ASKED: f"{_LOGITS}: vocab_choice_asked, of fuse_vocab_choice",
    operators.SOFT_EMBED: f"{_LOGITS}: vocab_soft_embed, of fuse_soft_embed",
}
