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

from dcompile.codegen.kernels.choice import choose
from dcompile.codegen.kernels.dot import arrives_last, rows_by_rows
from dcompile.codegen.triton.assemble import (
    Shape,
    assemble,
    count,
    operand,
    power_of_two,
    temporary,
)
from dcompile.codegen.triton.tiles import Tiles, shrunk
from dcompile.codegen.triton.variant import ConstantValue, Expression, Lowering, Scratch


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


def constants_of(
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


def name_of(constants: dict[str, ConstantValue], biased: bool) -> str:
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
    constants = constants_of(num_experts, top_k, score, groups, kept_groups, renormalize, scale)
    step = assemble(
        f"route_{name_of(constants, bias is not None)}_{dtype}",
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
    smaller: int = 0,
) -> Lowering:
    """A linear in `dtype` whose only reader is route, as one launch.

    Operands weights, experts, x [rows, hidden], w [num_experts, hidden], b [num_experts] (with
    `product_bias`), bias [num_experts] (the selection's, of dtype `bias`).  The product is in the dtype
    of w and b, by default that of x.
    """
    by = w_dtype or dtype
    tiles = tiles or Tiles(16, 0, 64 if by != "f32" else 32, splits=max(1, hidden // 256))
    tiles = shrunk(tiles, smaller, columns=False)
    suffix = "" if by == dtype else f"_by_{by}"
    constants = constants_of(num_experts, top_k, score, groups, kept_groups, renormalize, scale)
    row_tiles: Expression = {"cdiv": [rows, tiles.rows]}
    step = assemble(
        f"route_product_d{hidden}_{name_of(constants, bias is not None)}_{dtype}{suffix}",
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
