"""Which experts a row goes to, and with what weights: every router of the families in one kernel.

s = softmax(z) over all experts, or sigmoid(z).  Experts are chosen by c = s + bias, or by z + bias where
the score's name ends so (scores round to one value where logits do not), best first, the lowest
index on a tie, NaN last; `softmax_chosen` is a softmax of z over the chosen ones only;
with groups (DeepSeek-V3, arXiv 2412.19437) only from the best
`kept` groups, a group's score being the sum of its two best c.  Weights are s of the chosen, divided
by their sum + 1e-20 where renormalised, times `scale`.

`route_product` also multiplies: z = x W^T (+ b), the sum over the hidden size split between programs,
the last of which routes the tile of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.kernels.assemble import (
    Shape,
    assemble,
    count,
    operand,
    power_of_two,
    temporary,
)
from dcompile.codegen.kernels.configurations import Tiles
from dcompile.codegen.kernels.dot import arrives_last, rows_by_rows
from dcompile.codegen.kernels.variant import ConstantValue, Expression, Lowering, Scratch


@triton.jit
def choose(
    weights,
    experts,
    z,
    bias,
    row,
    live,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    TP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    OF_CHOSEN: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
):
    """Route rows with logits z f32 [BM, EP]; columns from E on are padding."""
    e = tl.arange(0, EP)
    real = (e < E)[None, :]
    if SIGMOID:
        s = 1.0 / (1.0 + tl.exp(-z))
    else:
        top = tl.max(tl.where(real, z, float("-inf")), 1)
        raised = tl.where(real, tl.exp(z - top[:, None]), 0.0)
        s = raised / tl.sum(raised, 1)[:, None]
    by = z if BY_LOGITS else s
    if bias is not None:
        by = by + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    by = tl.where(real & (by == by), by, float("-inf"))
    if GROUPS > 1:
        by = tl.where(kept_groups(by, e, E // GROUPS, GROUPS, KEPT, EP, BM), by, float("-inf"))
    left = tl.broadcast_to(real, [BM, EP])  # what is still to be chosen
    t = tl.arange(0, TP)
    found = tl.zeros([BM, TP], tl.float32)
    index = tl.zeros([BM, TP], tl.int32)
    for rank in tl.static_range(TOP):
        best = tl.max(tl.where(left, by, float("-inf")), 1)
        first = tl.min(tl.where(left & (by == best[:, None]), e[None, :], EP), 1)
        mine = e[None, :] == first[:, None]
        weight = tl.sum(tl.where(mine, z if OF_CHOSEN else s, 0.0), 1)
        found = tl.where(t[None, :] == rank, weight[:, None], found)
        index = tl.where(t[None, :] == rank, first[:, None], index)
        left = left & (e[None, :] != first[:, None])
    if OF_CHOSEN:
        taken = tl.where((t < TOP)[None, :], found, float("-inf"))
        lifted = tl.exp(taken - tl.max(taken, 1)[:, None])
        found = lifted / tl.sum(lifted, 1)[:, None]
    if RENORMALIZE:
        found = found / (tl.sum(found, 1) + 1e-20)[:, None]
    here = live[:, None] & (t < TOP)[None, :]
    place = row[:, None] * TOP + t[None, :]
    tl.store(weights + place, found * SCALE, mask=here)
    tl.store(experts + place, index, mask=here)


@triton.jit
def kept_groups(
    by,
    e,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
):
    """Which experts are of the KEPT best groups, bool [BM, EP]."""
    GP: tl.constexpr = 16 if GROUPS <= 16 else EP
    g = tl.arange(0, GP)
    scores = tl.zeros([BM, GP], tl.float32)
    for group in tl.static_range(GROUPS):
        member = tl.where((e // SIZE == group)[None, :], by, float("-inf"))
        best = tl.max(member, 1)
        score = best
        if SIZE > 1:
            first = tl.min(tl.where(member == best[:, None], e[None, :], EP), 1)
            second = tl.where(e[None, :] == first[:, None], float("-inf"), member)
            score = best + tl.max(second, 1)
        scores = tl.where(g[None, :] == group, score[:, None], scores)
    left = tl.broadcast_to((g < GROUPS)[None, :], [BM, GP])
    kept = tl.broadcast_to((e < 0)[None, :], [BM, EP])
    for _ in tl.static_range(KEPT):
        best_group = tl.max(tl.where(left, scores, float("-inf")), 1)
        chosen = tl.min(tl.where(left & (scores == best_group[:, None]), g[None, :], GP), 1)
        kept = kept | (e[None, :] // SIZE == chosen[:, None])
        left = left & (g[None, :] != chosen[:, None])
    return kept


@triton.jit
def route(
    weights,
    experts,
    logits,
    bias,
    rows,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    TP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    OF_CHOSEN: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
):
    """weights f32 [rows, TOP], experts i32 [rows, TOP], logits [rows, E], bias [E]."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < rows
    e = tl.arange(0, EP)
    here = live[:, None] & (e < E)[None, :]
    z = tl.load(logits + row[:, None] * E + e[None, :], mask=here, other=0.0).to(tl.float32)
    choose(
        weights,
        experts,
        z,
        bias,
        row,
        live,
        E,
        EP,
        TOP,
        TP,
        SIGMOID,
        BY_LOGITS,
        OF_CHOSEN,
        GROUPS,
        KEPT,
        RENORMALIZE,
        SCALE,
        BM,
    )


@triton.jit
def route_product(
    weights,
    experts,
    x,
    w,
    b,
    bias,
    partial,
    ticket,
    rows,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BK: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    TP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    OF_CHOSEN: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
):
    """x [rows, K], w [E, K], b [E] of the product; logits are rounded to x's dtype, as stored ones are."""
    SPAN: tl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS) * BK
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < rows
    e = tl.arange(0, EP)
    here = live[:, None] & (e < E)[None, :]
    start = tl.program_id(1) * SPAN
    end = tl.minimum(start + SPAN, K)
    acc = rows_by_rows(x + row * K, w + e * K, live, e < E, start, end, K, BM, EP, BK)
    place = row[:, None] * E + e[None, :]
    tl.store(partial + tl.program_id(1) * rows * E + place, acc, mask=here)
    if arrives_last(ticket + tl.program_id(0), SPLITS):
        z = tl.zeros([BM, EP], tl.float32)
        for split in range(SPLITS):
            part = partial + split * rows * E + place
            z += tl.load(part, mask=here, other=0.0, cache_modifier=".cg")
        if b is not None:
            z += tl.load(b + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        z = z.to(w.dtype.element_ty).to(tl.float32)
        choose(
            weights,
            experts,
            z,
            bias,
            row,
            live,
            E,
            EP,
            TOP,
            TP,
            SIGMOID,
            BY_LOGITS,
            OF_CHOSEN,
            GROUPS,
            KEPT,
            RENORMALIZE,
            SCALE,
            BM,
        )


SCORES = ("softmax", "sigmoid", "softmax_by_logits", "sigmoid_by_logits", "softmax_chosen")


def _constants(
    num_experts: int,
    top_k: int,
    score: str,
    groups: int,
    kept_groups: int,
    renormalize: bool,
    scale: float,
) -> dict[str, ConstantValue]:
    assert score in SCORES, score
    grouped = groups > 1
    return {
        **{"E": num_experts, "EP": power_of_two(num_experts, 16), "TOP": top_k},
        **{"TP": power_of_two(top_k), "SIGMOID": score.startswith("sigmoid")},
        **{"BY_LOGITS": score not in ("softmax", "sigmoid")},
        "OF_CHOSEN": score == "softmax_chosen",
        **{"GROUPS": groups if grouped else 1, "KEPT": kept_groups if grouped else 1},
        **{"RENORMALIZE": renormalize, "SCALE": scale},
    }


def _name(constants: dict[str, ConstantValue], biased: bool) -> str:
    score = "sigmoid" if constants["SIGMOID"] else "softmax"
    if constants["BY_LOGITS"]:
        score += "_chosen" if constants["OF_CHOSEN"] else "_by_logits"
    grouped = f"_g{constants['GROUPS']}of{constants['KEPT']}" if constants["GROUPS"] != 1 else ""
    parts = f"{'_renorm' if constants['RENORMALIZE'] else ''}{'_bias' if biased else ''}"
    return f"{score}{grouped}{parts}_e{constants['E']}k{constants['TOP']}"


def launches(
    *,
    rows: Expression,
    num_experts: int,
    top_k: int,
    score: str = "softmax",
    groups: int = 1,
    kept_groups: int = 1,
    renormalize: bool = False,
    scale: float = 1.0,
    dtype: str = "f32",
    bias: str | None = None,
) -> Lowering:
    """Operands weights, experts [rows, top_k], logits [rows, num_experts] of `dtype`, bias of dtype `bias`."""
    constants = _constants(num_experts, top_k, score, groups, kept_groups, renormalize, scale)
    step = assemble(
        f"route_{_name(constants, bias is not None)}_{dtype}",
        "route:route",
        [
            operand("weights", "f32"),
            operand("experts", "i32"),
            operand("logits", dtype),
            operand("bias", bias or "f32", bias is not None),
            count("rows", rows),
        ],
        {**constants, "BM": 1},
        Shape((rows, 1, 1), warps=1, stages=1),
    )
    return Lowering((step,))


def product_launches(
    *,
    rows: Expression,
    hidden: int,
    num_experts: int,
    top_k: int,
    dtype: str,
    score: str = "softmax",
    groups: int = 1,
    kept_groups: int = 1,
    renormalize: bool = False,
    scale: float = 1.0,
    bias: str | None = None,
    product_bias: bool = False,
    w_dtype: str | None = None,
    tiles: Tiles | None = None,
) -> Lowering:
    """A linear in `dtype` whose only reader is route, as one launch.

    Operands weights, experts, x [rows, hidden], w [num_experts, hidden], b [num_experts] (with
    `product_bias`), bias [num_experts] (the selection's, of dtype `bias`).  The product is in the dtype
    of w and b, by default that of x.
    """
    by = w_dtype or dtype
    tiles = tiles or Tiles(16, 0, 64 if by != "f32" else 32, splits=max(1, hidden // 256))
    suffix = "" if by == dtype else f"_by_{by}"
    constants = _constants(num_experts, top_k, score, groups, kept_groups, renormalize, scale)
    row_tiles: Expression = {"cdiv": [rows, tiles.rows]}
    step = assemble(
        f"route_product_d{hidden}_{_name(constants, bias is not None)}_{dtype}{suffix}",
        "route:route_product",
        [
            operand("weights", "f32"),
            operand("experts", "i32"),
            operand("x", dtype),
            operand("w", by),
            operand("b", by, product_bias),
            operand("bias", bias or "f32", bias is not None),
            temporary("partial", "f32"),
            temporary("ticket", "i32"),
            count("rows", rows),
        ],
        {
            **{"K": hidden, "SPLITS": tiles.splits, "BK": tiles.depth},
            **constants,
            "BM": tiles.rows,
        },
        Shape((row_tiles, tiles.splits, 1), tiles.warps, tiles.stages),
    )
    return Lowering(
        (step,),
        (
            Scratch("partial", "f32", {"mul": [rows, tiles.splits * num_experts]}),
            Scratch("ticket", "i32", row_tiles, zeroed=True),
        ),
    )
