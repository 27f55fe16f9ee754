"""Bytes and FLOPs of a CUDA plan's launches: of each kernel by its function, its widths and what it ran over.

An operator may be several launches here; together their operations are those of the processor's one. What they
hand to each other through scratch is counted where it is read, and not where the plan says only how large it
may become.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dcompile.runtime.artifact import Artifact

if TYPE_CHECKING:
    from dcompile.cost.launches import Call, Work

ROUTERS = ("route:route", "route:route_product")
LIMITED = ("route_limited:choose_within", "route_limited:drop", "route_limited:reroute")
SORT, CHOICE = "moe_ffn:sort_by_expert", "vocab_choice:choose_partly"


def described(artifact: Artifact) -> Mapping[str, Any]:
    """An artifact's plan; each launch of a CUDA kernel says its function, named arguments and constants."""
    plan = artifact.plan.text
    if artifact.manifest["target"] != "cuda":
        return plan
    kernels = json.loads(artifact.text(artifact.manifest["kernels"]["table"]))["kernels"]
    return {**plan, "launches": [_described(one, kernels) for one in plan["launches"]]}


def _described(launch: Mapping[str, Any], kernels: Mapping[str, Any]) -> Mapping[str, Any]:
    entry = kernels[launch["kernel"]]
    names = [argument["name"] for argument in entry["arguments"]]
    return {
        **launch,
        "function": entry["kernel"].removeprefix("dcompile.codegen.kernels."),
        "named": dict(zip(names, launch["args"], strict=True)),
        "constants": dict(entry["constants"]),
    }


class Named:
    """A launch's arguments by the names that its kernel has for them."""

    def __init__(self, call: Call) -> None:
        self.call, self.constants = call, call.launch["constants"]

    def __getitem__(self, constant: str) -> int:
        return int(self.constants[constant])

    def bytes(self, *names: str) -> int:
        """Of the arguments that are there; scratch is as large as the plan lets it be."""
        return sum(self.call.elements(b) * self.call.itemsize(b) for b in self._buffers(names))

    def item(self, name: str) -> int:
        (buffer,) = self._buffers((name,))
        return self.call.itemsize(buffer)

    def rows(self, name: str, width: int) -> int:
        """Rows of an argument whose rows have `width` elements, however it is shaped."""
        return sum(self.call.elements(b) for b in self._buffers((name,))) // width

    def _buffers(self, names: tuple[str, ...]) -> list[int]:
        given = self.call.launch["named"]
        return [given[name]["b"] for name in names if name in given]


def _linear(n: Named, work: type[Work]) -> Work:
    rows = n.rows("x", n["K"])
    moved = n.bytes("x", "w", "bias", "other", "y")
    return work(moved, 2 * rows * n["N"] * n["K"], n.bytes("w", "bias"))


def _gated(n: Named, work: type[Work]) -> Work:
    rows = n.rows("x", n["K"])
    operations = 4 * rows * n["N"] * n["K"] + 4 * rows * n["N"]
    return work(n.bytes("x", "w", "bias", "y"), operations, n.bytes("w", "bias"))


def _route(n: Named, work: type[Work]) -> Work:
    moved = n.bytes("logits", "x", "w", "b", "bias", "weights", "experts")
    rows = n.rows("weights", n["TOP"])
    product = 2 * rows * n["K"] * n["E"] if "K" in n.constants else 0
    return work(moved, product + 4 * rows * n["E"], n.bytes("w", "b"))


def _slots(n: Named, rows: int) -> tuple[float, float, int | None]:
    """Slots that have an expert, experts (shared ones among them) that have a slot, and as looked at."""
    choices, experts = n["CHOICES"], n["EXPERTS"]
    facts, routed = n.call.facts, n.call.routed
    chosen = None if routed is None else facts.experts.get(routed)
    if chosen is None:
        # Without a look at the router: uniform routing.
        return rows * choices, experts * (1 - (1 - choices / experts) ** rows), None
    shared = choices - chosen.shape[1]
    there = chosen[chosen >= 0]
    touched = len(np.unique(there))
    return there.size + rows * shared, touched + shared, touched


def _gate_up(n: Named, work: type[Work]) -> Work:
    rows = n.rows("x", n["K"])
    slots, touched, looked = _slots(n, rows)
    weights = n.bytes("w", "bias") * touched / n["EXPERTS"]
    item = n.item("x")
    moved = weights + n.bytes("x") + slots * (n["N"] * item + 4)
    return work(moved, 4 * slots * n["N"] * n["K"], weights, looked)


def _down(n: Named, work: type[Work]) -> Work:
    rows = n.rows("y", n["N"])
    slots, touched, looked = _slots(n, rows)
    weights = n.bytes("w", "bias") * touched / n["EXPERTS"]
    moved = weights + slots * (n["K"] * n.item("y") + 4) + n.bytes("weights", "y")
    return work(moved, 2 * slots * n["N"] * n["K"], weights, looked)


def _sort(n: Named, work: type[Work]) -> Work:
    return work(n.bytes("experts", "order", "counts"), 0)


def _attend(n: Named, work: type[Work]) -> Work:
    facts, size = n.call.facts, n["SIZE"]
    rows = n.rows("o", n["H"] * size)
    seen, read = facts.keys(rows)
    cache = n.item("keys") * 2 * read * n["G"] * size
    kept = cache * max(0, read - facts.R) / max(read, 1)
    return work(2 * n.bytes("o") + cache, 4 * seen * n["H"] * size, kept)


def _norm_rope_write(n: Named, work: type[Work]) -> Work:
    heads, groups, size, turned = n["H"], n["G"], n["SIZE"], n["ROT"]
    rows = n.rows("q", heads * size)
    written = rows * (heads + 2 * groups) * size * n.item("q")
    tables = 2 * rows * turned * 4
    operations = rows * (heads + groups) * (4 * size + 3 * turned)
    return work(n.bytes("qkv") + written + tables, operations)


def _gathered(n: Named, work: type[Work]) -> Work:
    index = n.bytes("index") or n.bytes("row_seq", "row_pos") + n.rows("out", n["WIDTH"]) * 8
    return work(2 * n.bytes("out") + index, 0)


def _normed(n: Named, work: type[Work]) -> Work:
    moved = n.bytes("total", "y", "y", "w", "r")
    added = "r" in n.call.launch["named"]
    return work(moved, (5 if added else 4) * n.rows("y", 1))


def _silu_mul(n: Named, work: type[Work]) -> Work:
    return work(3 * n.bytes("y"), 4 * n.rows("y", 1))


def _choice(n: Named, work: type[Work]) -> Work:
    live = n.call.facts.live.get(n.call.at, n.rows("x", n["D"]))
    moved = n.bytes("w", "bias") + live * n["D"] * n.item("x")
    return work(moved, 2 * live * n["V"] * n["D"], n.bytes("w", "bias"))


def _told(n: Named, work: type[Work]) -> Work:
    asked = n.bytes("asked") // 8
    rows = n.rows("x", n["D"])
    moved = n.bytes("x", "probability", "score", "asked") + asked * n["D"] * n.item("w")
    return work(moved, 2 * asked * n["D"] + 3 * rows)


def _live(n: Named) -> int:
    # How many rows are still masks is not looked at: those that choose tokens, at least.
    return min(n.rows("live", 1), sum(n.call.facts.live.values()))


def _softened(n: Named, work: type[Work]) -> Work:
    live = _live(n)
    moved = n.bytes("w", "bias") + live * (n["D"] + n["V"]) * n.item("x")
    return work(moved, 2 * live * n["V"] * n["D"], n.bytes("w", "bias"))


def _mixed(n: Named, work: type[Work]) -> Work:
    live = _live(n)
    table = n["V"] * n["N"] * n.item("table")
    moved = table + live * n["V"] * n.item("logits") + n.bytes("y")
    return work(moved, 2 * live * n["V"] * n["N"], table)


FORMULAS: Mapping[str, Callable[[Named, type[Work]], Work]] = {
    **{"linear:linear": _linear, "linear:gated": _gated, SORT: _sort, CHOICE: _choice},
    **dict.fromkeys(ROUTERS, _route),
    **{"moe_ffn:gate_up": _gate_up, "moe_ffn:down": _down, "attend:attend": _attend},
    **{"norm_rope_write:norm_rope_write": _norm_rope_write, "norms:rms_norm": _normed},
    **{"gather:gather_rows": _gathered, "gather:canvas_embedding": _gathered},
    **{"silu_mul:activate_and_multiply": _silu_mul, "vocab_choice:tell": _told},
    **{"soft_embed:soften": _softened, "soft_embed:mix": _mixed},
}
