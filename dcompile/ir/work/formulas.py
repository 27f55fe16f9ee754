"""The work of every operator that a kernel computes, by the operator's name.

They stand apart from `ir/operators/`, which registers with torch, so that an artifact is profiled and
explained without it.  A product of [R, K] and [K, N] is 2 R N K operations; small operators count
one an element for each operation of their formula.  Of a tensor that is read in part, bytes are that
share of the tensor's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dcompile.ir.work import Operands, Touched, Work

Counter = Callable[[Operands, Touched], Work]


def linear(of: Operands, touched: Touched) -> Work:
    """Weights are streamed, whatever has room for x and y."""
    operations = 2 * of["y"].elements * of["input"].shape[-1]
    return Work(of.bytes(), operations, of.bytes("weight", "bias"))


def moe_ffn(of: Operands, touched: Touched) -> Work:
    """Of the weights the share of the experts that have a row."""
    count, hidden, width = of["down"].shape
    rows, choices = of["experts"].shape
    # Without a look at the router: uniform routing.
    uniform = count * (1 - (1 - choices / count) ** rows)
    experts = uniform if touched.experts is None else touched.experts
    slots = rows * choices if touched.slots is None else touched.slots
    weights = of.bytes("gate_up", "down", "gate_up_bias", "down_bias") * experts / count
    moved = weights + of.bytes("x", "weights", "experts", "y")
    return Work(moved, 6 * slots * hidden * width, weights)


def attend(of: Operands, touched: Touched) -> Work:
    """Keys and values that a row sees are read once, those of earlier iterations from memory."""
    slots, length, *_ = of["keys"].shape
    _, heads, size = of["o"].shape
    cache = of.bytes("keys", "values") / (slots * length)
    streamed = cache * max(0, touched.read - touched.fresh)
    operations = 4 * touched.seen * heads * size
    return Work(of.bytes("o", "q") + cache * touched.read, operations, streamed)


def norm_rope_write(of: Operands, touched: Touched) -> Work:
    """The rows' own keys, values and lines of the tables; the rest of both stays where it is."""
    rows, heads, size = of["q"].shape
    slots, length, groups, _ = of["keys"].shape
    positions, turned = of["cos"].shape
    written = of.bytes("keys", "values") * rows / (slots * length)
    tables = of.bytes("cos", "sin") * rows / positions
    operations = rows * (heads + groups) * (4 * size + 3 * turned)
    return Work(of.bytes("qkv", "q") + written + tables, operations)


def write_rows(of: Operands, touched: Touched) -> Work:
    return Work(2 * of.bytes("rows") + of.bytes("row_seq", "row_pos"), 0)


def embedding(of: Operands, touched: Touched) -> Work:
    table = of["weight"].each * of["out"].elements
    return Work(table + of.bytes("out", "indices"), 0)


def gather(of: Operands, touched: Touched) -> Work:
    rows = of["self"].each * of["out"].elements
    return Work(rows + of.bytes("out", "index"), 0)


def rms_norm(of: Operands, touched: Touched) -> Work:
    return Work(of.bytes(), 4 * of["y"].elements)


def add_rms_norm(of: Operands, touched: Touched) -> Work:
    """Without r it is rms_norm."""
    return Work(of.bytes(), 4 * of["y"].elements + of.elements("r"))


def silu_mul(of: Operands, touched: Touched) -> Work:
    return Work(of.bytes(), 4 * of["y"].elements)


def route(of: Operands, touched: Touched) -> Work:
    return Work(of.bytes(), 4 * of["logits"].elements)


def choose(of: Operands, touched: Touched) -> Work:
    """Logits of live candidates: a maximum, an exponential, two sums."""
    *_, vocabulary = of["logits"].shape
    read, live = _live(of, "logits", touched)
    return Work(of.bytes() - of.bytes("logits") + read, 4 * live * vocabulary)


def vocab_choice(of: Operands, touched: Touched) -> Work:
    """The projection of live candidates; its weights are streamed whatever their number."""
    vocabulary, hidden = of["weight"].shape
    read, live = _live(of, "x", touched)
    moved = of.bytes() - of.bytes("x") + read
    return Work(moved, 2 * live * vocabulary * hidden, of.bytes("weight", "bias"))


def soft_embed(of: Operands, touched: Touched) -> Work:
    """Live rows by as much of the table as there are logits."""
    *_, vocabulary = of["logits"].shape
    rows, width = of["table"].shape
    read, live = _live(of, "logits", touched)
    table = of.bytes("table") * vocabulary / rows
    moved = table + read + of.bytes("live", "weight", "y")
    return Work(moved, 2 * live * vocabulary * width, table)


def vocab_soft_embed(of: Operands, touched: Touched) -> Work:
    vocabulary, hidden = of["head"].shape
    rows, width = of["table"].shape
    read, live = _live(of, "x", touched)
    weights = of.bytes("head", "bias") + of.bytes("table") * vocabulary / rows
    moved = weights + read + of.bytes("live", "weight", "y")
    return Work(moved, 2 * live * vocabulary * (hidden + width), weights)


def _live(of: Operands, name: str, touched: Touched) -> tuple[float, int]:
    """Bytes of the live rows of an operand, and how many they are."""
    count = of[name].elements // of[name].shape[-1]
    live = count if touched.live is None else min(touched.live, count)
    return of[name].bytes * live / count, live


WORKS: Mapping[str, Counter] = {
    **{"linear": linear, "rms_norm": rms_norm, "embedding": embedding, "index_select": gather},
    **{"attend": attend, "norm_rope_write": norm_rope_write, "write_rows": write_rows},
    **{"add_rms_norm": add_rms_norm, "silu_mul": silu_mul, "moe_ffn": moe_ffn},
    **{"route": route, "route_limited": route},
    **{"choose": choose, "choose_asked": choose},
    **{"vocab_choice": vocab_choice, "vocab_choice_asked": vocab_choice},
    **{"soft_embed": soft_embed, "vocab_soft_embed": vocab_soft_embed},
}
