"""A mixture of gated FFNs: y[r] = sum_j w[r, j] down_e(act(gate_e(x[r])) * up_e(x[r])), e = experts[r, j].

Three launches with one fixed grid each, whatever the routing (after MegaBlocks, arXiv 2211.15841):
* `sort_by_expert`: the slots (r, j) in order of their expert, and how many each expert has;
* `gate_up`: tiles of slots of one expert times its gate and up rows, activation, product;
* `down`: the same tiles times the expert's down rows, weighted, as float32; the last program of a
  column tile adds each row's slots in the order of j.
An expert without slots has no tiles, so its weights are never read.  A slot's numbers depend on its
row and expert alone, and sums have one order: no float is added atomically.

Shared experts come after the routed ones in the stacked weights (expert E + s); every row chooses
them, with weight one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.kernels.dot import arrives_last, rows_by_rows
from dcompile.codegen.kernels.linear import gate_and_up
from dcompile.codegen.triton.assemble import (
    PACKAGE,
    Argument,
    Shape,
    assemble,
    cdiv,
    count,
    operand,
    power_of_two,
    temporary,
)
from dcompile.codegen.triton.tiles import Tiles, down_tiles, gate_up_tiles, shrunk
from dcompile.codegen.triton.variant import ConstantValue, Expression, Lowering, Scratch, Step


@triton.jit
def expert_of(experts, slot, live, E: tl.constexpr, TOP: tl.constexpr, SHARED: tl.constexpr):
    """The expert of slots (r, j) = r (TOP + SHARED) + j; a shared one from j = TOP on.

    A slot without an expert (-1, of limited routing) is behind all.
    """
    r = slot // (TOP + SHARED)
    j = slot % (TOP + SHARED)
    routed = tl.load(experts + r * TOP + j, mask=live & (j < TOP), other=0)
    routed = tl.where(routed < 0, E + SHARED, routed)
    return tl.where(j < TOP, routed, E + j - TOP)


@triton.jit
def sort_by_expert(
    order,
    counts,
    experts,
    rows,
    E: tl.constexpr,
    TOP: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """order i32 [rows (TOP + SHARED)], counts i32 [E + SHARED]; one program an expert, two passes."""
    expert = tl.program_id(0)
    slots = rows * (TOP + SHARED)
    i = tl.arange(0, BLOCK)
    before = 0
    mine = 0
    for base in range(0, slots, BLOCK):
        live = base + i < slots
        e = expert_of(experts, base + i, live, E, TOP, SHARED)
        before += tl.sum((live & (e < expert)).to(tl.int32), 0)
        mine += tl.sum((live & (e == expert)).to(tl.int32), 0)
    tl.store(counts + expert, mine)
    for base in range(0, slots, BLOCK):
        inside = base + i < slots
        own = inside & (expert_of(experts, base + i, inside, E, TOP, SHARED) == expert)
        rank = tl.cumsum(own.to(tl.int32), 0)
        tl.store(order + before + rank - 1, base + i, mask=own)
        before += tl.sum(own.to(tl.int32), 0)


@triton.jit
def find_tile(counts, tile, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """(expert, first place in `order`, slots left, tiles in all) of a tile of slots."""
    e = tl.arange(0, EP)
    n = tl.load(counts + e, mask=e < E, other=0)
    tiles = (n + BM - 1) // BM
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    within = tile - tl.sum(tl.where(e < expert, tiles, 0), 0)
    first = tl.sum(tl.where(e < expert, n, 0), 0) + within * BM
    left = tl.sum(tl.where(e == expert, n, 0), 0) - within * BM
    return expert, first, left, tl.sum(tiles, 0)


@triton.jit
def gate_up(
    hidden,
    x,
    w,
    bias,
    order,
    counts,
    ACTIVATION: tl.constexpr,
    EXPERTS: tl.constexpr,
    EP: tl.constexpr,
    CHOICES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden [rows CHOICES, N] by slot, x [rows, K], w [EXPERTS, 2 N, K], bias [EXPERTS, 2 N]."""
    tile = tl.program_id(0)
    expert, first, left, tiles = find_tile(counts, tile, EXPERTS, EP, BM)
    if tile < tiles:
        i = tl.arange(0, BM)
        live = i < left
        slot = tl.load(order + first + i, mask=live, other=0)
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = column < N
        own = w + expert.to(tl.int64) * (2 * N * K)
        source = x + slot // CHOICES * K
        gate, up = gate_and_up(source, own + column * K, live, inside, N, K, BM, BN, BK)
        if bias is not None:
            at = bias + expert * 2 * N + column
            gate += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
            up += tl.load(at + N, mask=inside, other=0.0).to(tl.float32)[None, :]
        out = (ACTIVATION(gate) * up).to(hidden.dtype.element_ty)
        place = slot[:, None] * N + column[None, :]
        tl.store(hidden + place, out, mask=live[:, None] & inside[None, :])


@triton.jit
def down(
    y,
    hidden,
    w,
    bias,
    weights,
    experts,
    order,
    counts,
    partial,
    ticket,
    rows,
    EXPERTS: tl.constexpr,
    EP: tl.constexpr,
    CHOICES: tl.constexpr,
    TOP: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y [rows, N], hidden [rows CHOICES, K], w [EXPERTS, N, K], weights f32, experts i32 [rows, TOP].

    experts are given where a slot may be without one (-1).  partial f32 [rows CHOICES, N]; ticket i32
    [column tiles].
    """
    tile = tl.program_id(0)
    expert, first, left, tiles = find_tile(counts, tile, EXPERTS, EP, BM)
    if tile < tiles:
        i = tl.arange(0, BM)
        live = i < left
        slot = tl.load(order + first + i, mask=live, other=0)
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = column < N
        own = w + expert.to(tl.int64) * (N * K)
        acc = rows_by_rows(hidden + slot * K, own + column * K, live, inside, 0, K, K, BM, BN, BK)
        if bias is not None:
            at = bias + expert * N + column
            acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
        j = slot % CHOICES
        weight = tl.load(weights + slot // CHOICES * TOP + j, mask=live & (j < TOP), other=1.0)
        place = slot[:, None] * N + column[None, :]
        tl.store(partial + place, acc * weight[:, None], mask=live[:, None] & inside[None, :])
        if arrives_last(ticket + tl.program_id(1), tiles):
            combine(y, partial, experts, column, inside, rows, CHOICES, TOP, N, BM)


@triton.jit
def combine(
    y,
    partial,
    experts,
    column,
    inside,
    rows,
    CHOICES: tl.constexpr,
    TOP: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
):
    """y[r] = sum over j of partial[r, j], in the order of j, for one tile of columns and all rows."""
    for base in range(0, rows, BM):
        row = base + tl.arange(0, BM)
        total = part_of(partial, experts, row, 0, column, inside, rows, CHOICES, TOP, N)
        for j in range(1, CHOICES):
            total += part_of(partial, experts, row, j, column, inside, rows, CHOICES, TOP, N)
        here = (row < rows)[:, None] & inside[None, :]
        tl.store(y + row[:, None] * N + column[None, :], total.to(y.dtype.element_ty), mask=here)


@triton.jit
def part_of(
    partial,
    experts,
    row,
    j,
    column,
    inside,
    rows,
    CHOICES: tl.constexpr,
    TOP: tl.constexpr,
    N: tl.constexpr,
):
    """partial[r, j] of a tile of rows and columns; 0 where the slot has no expert."""
    taken = row < rows
    if experts is not None:
        routed = taken & (j < TOP)
        taken = taken & (tl.load(experts + row * TOP + j, mask=routed, other=0) >= 0)
    at = partial + (row[:, None] * CHOICES + j) * N + column[None, :]
    return tl.load(at, mask=taken[:, None] & inside[None, :], other=0.0, cache_modifier=".cg")


def launches(
    *,
    rows: Expression,
    hidden: int,
    width: int,
    num_experts: int,
    top_k: int,
    dtype: str,
    arch: int,
    activation: str = "silu",
    gate_up_bias: bool = False,
    down_bias: bool = False,
    shared: int = 0,
    limited: bool = False,
    up_tiles: Tiles | None = None,
    out_tiles: Tiles | None = None,
    smaller: int = 0,
) -> Lowering:
    """Operands y, x [rows, hidden], weights f32, experts i32 [rows, top_k], gate_up, down and their biases.

    gate_up [num_experts + shared, 2 width, hidden] (gate first), down [num_experts + shared, hidden, width].
    With `limited` a slot may have the expert -1, and adds nothing; some slot must have one.
    """
    stacked = num_experts + shared
    up = shrunk(up_tiles or gate_up_tiles(width, hidden, stacked, dtype, arch), smaller)
    out = shrunk(out_tiles or down_tiles(hidden, width, stacked, dtype, arch), smaller)
    choices = top_k + shared
    slots: Expression = {"mul": [rows, choices]}
    name = f"e{num_experts}k{top_k}{f's{shared}' if shared else ''}"
    of_tiles: dict[str, ConstantValue] = {
        **{"EXPERTS": num_experts + shared, "EP": power_of_two(num_experts + shared, 16)},
        "CHOICES": choices,
    }
    sort = assemble(
        f"moe_ffn_sort_{name}",
        "moe_ffn:sort_by_expert",
        [
            temporary("order", "i32"),
            temporary("counts", "i32"),
            operand("experts", "i32"),
            count("rows", rows),
        ],
        {"E": num_experts, "TOP": top_k, "SHARED": shared, "BLOCK": 1024},
        Shape((num_experts + shared, 1, 1), warps=4, stages=1),
    )
    first = assemble(
        f"moe_ffn_gate_up_{activation}_d{hidden}f{width}{name}{'_bias' if gate_up_bias else ''}_{dtype}",
        "moe_ffn:gate_up",
        [
            temporary("hidden", dtype),
            operand("x", dtype),
            operand("w", dtype, called="gate_up"),
            operand("bias", dtype, gate_up_bias, called="gate_up_bias"),
            temporary("order", "i32"),
            temporary("counts", "i32"),
        ],
        {
            "ACTIVATION": f"{PACKAGE}.pointwise:{activation}",
            **of_tiles,
            **{"N": width, "K": hidden, "BM": up.rows, "BN": up.columns, "BK": up.depth},
        },
        _over_tiles(slots, num_experts + shared, width, up),
    )
    scratch = (
        Scratch("order", "i32", slots),
        Scratch("counts", "i32", num_experts + shared),
        Scratch("hidden", dtype, {"mul": [slots, width]}),  # type: ignore[arg-type]
        Scratch("partial", "f32", {"mul": [slots, hidden]}),
        Scratch("ticket", "i32", cdiv(hidden, out.columns), zeroed=True),
    )
    marks = f"{'_limited' if limited else ''}{'_bias' if down_bias else ''}"
    last = f"moe_ffn_down_d{hidden}f{width}{name}{marks}_{dtype}"
    grid = _over_tiles(slots, num_experts + shared, hidden, out)
    constants = {**of_tiles, "TOP": top_k, "N": hidden, "K": width}
    second = _down(last, rows, dtype, down_bias, limited, constants, out, grid)
    return Lowering((sort, first, second), scratch)


def _down(
    name: str,
    rows: Expression,
    dtype: str,
    bias: bool,
    limited: bool,
    constants: dict[str, ConstantValue],
    tiles: Tiles,
    shape: Shape,
) -> Step:
    arguments: list[Argument] = [
        operand("y", dtype),
        temporary("hidden", dtype),
        operand("w", dtype, called="down"),
        operand("bias", dtype, bias, called="down_bias"),
        operand("weights", "f32"),
        operand("experts", "i32", limited),
        *(temporary(n, "i32") for n in ("order", "counts")),
        temporary("partial", "f32"),
        temporary("ticket", "i32"),
        count("rows", rows),
    ]
    sizes = {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth}
    return assemble(name, "moe_ffn:down", arguments, {**constants, **sizes}, shape)


def _over_tiles(slots: Expression, experts: int, columns: int, tiles: Tiles) -> Shape:
    """Every expert may end in a tile that is not full, so there are at most this many."""
    most: Expression = {"sum": [{"min": [experts, slots]}, {"cdiv": [slots, tiles.rows]}]}
    return Shape((most, cdiv(columns, tiles.columns), 1), tiles.warps, tiles.stages)
