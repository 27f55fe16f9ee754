"""out[i] = x[index[i]]: rows of a table, as in an embedding or a choice of rows.

`canvas_embedding` reads its index from the canvas: out[r] = table[canvas[row_seq[r], row_pos[r]]].
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.triton.assemble import Shape, assemble, cdiv, count, operand, power_of_two
from dcompile.codegen.triton.variant import Expression, Lowering


@triton.jit
def gather_rows(out, x, index, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, WIDTH], x [any, WIDTH], index i64 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row)
    inside = i < WIDTH
    taken = tl.load(x + source * WIDTH + i, mask=inside, other=0)
    tl.store(out + row * WIDTH + i, taken, mask=inside)


@triton.jit
def canvas_embedding(
    out,
    table,
    canvas,
    row_seq,
    row_pos,
    rows,
    L: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [rows, WIDTH], table [V, WIDTH], canvas i64 [N, L], row_seq, row_pos i64 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(canvas + tl.load(row_seq + row) * L + tl.load(row_pos + row))
    inside = i < WIDTH
    taken = tl.load(table + token * WIDTH + i, mask=inside, other=0)
    tl.store(out + row * WIDTH + i, taken, mask=inside)


def launches(*, rows: Expression, width: int, dtype: str) -> Lowering:
    """Operands out [rows, width], x, index i64 [rows]; an embedding's table is x."""
    block = min(1024, power_of_two(width, 32))
    step = assemble(
        f"gather_rows_w{width}_{dtype}",
        "gather:gather_rows",
        [operand("out", dtype), operand("x", dtype), operand("index", "i64"), count("rows", rows)],
        {"WIDTH": width, "BLOCK": block},
        Shape((rows, cdiv(width, block), 1), warps=max(1, block // 256)),
    )
    return Lowering((step,))


def canvas_launches(*, rows: Expression, positions: int, width: int, dtype: str) -> Lowering:
    """Operands out, table, canvas [N, positions], row_seq, row_pos: the step's first two operators."""
    block = min(1024, power_of_two(width, 32))
    step = assemble(
        f"canvas_embedding_w{width}_{dtype}",
        "gather:canvas_embedding",
        [
            operand("out", dtype),
            operand("table", dtype),
            *(operand(name, "i64") for name in ("canvas", "row_seq", "row_pos")),
            count("rows", rows),
        ],
        {"L": positions, "WIDTH": width, "BLOCK": block},
        Shape((rows, cdiv(width, block), 1), warps=max(1, block // 256)),
    )
    return Lowering((step,))
