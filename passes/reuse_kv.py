"""attention over a whole sequence -> write these rows of K and V, then attend to the valid rows

Input (tests/golden/tiny_moe; q, k and v are add_91, add_120 and linear_2, turned heads first):

    scaled_dot_product_attention: f32[1, 4, R, 16] = scaled_dot_product_attention.default(q, k, v, ...)

Output, tidied; keys_0 and values_0 are new state, row_limit is a new input:

    reshape_default_25: f32[R, 2, 16] = reshape.default(add_120, [-1, 2, 16])
    write_rows_default: f32[2, 64, 2, 16] = dcompile.write_rows(keys_0, reshape_default_25, row_seq, row_pos)
    reshape_default_33: f32[R, 2, 16] = reshape.default(linear_2, [-1, 2, 16])
    write_rows_default_1: f32[2, 64, 2, 16] = dcompile.write_rows(values_0, reshape_default_33, ...)
    reshape_default_27: f32[R, 4, 16] = reshape.default(add_91, [-1, 4, 16])
    attend_default: f32[R, 4, 16] = dcompile.attend(reshape_default_27, ..., row_seq, row_limit, 0.25)
    reshape_default_34: f32[1, R, 64] = reshape.default(attend_default, [1, -1, 64])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.errors import UnsupportedModel
from dcompile.ir import operators
from dcompile.ir.edit import add_input, fake_mode, insert, replace, value
from dcompile.ir.evaluate import fixed_nodes
from dcompile.ir.meta import facts
from dcompile.ir.program import Exactness, Output, Program, Stage
from dcompile.ir.sizes import is_static
from dcompile.passes.mask_blocks import NEITHER, first_departure, mask_block, same_value
from dcompile.passes.positionwise import prove

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class ReuseKV:
    """Let the graph run any rows of any sequences: keys and values live in state, by slot.

    Proves first that everything outside the attentions treats each position by itself, and raises
    MixesPositions with the node and its module where it does not.  EXACT for the rows computed, given
    keys and values that are up to date: which rows those are is the cache policy's choice.
    """

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        sites = list(program.calls(SDPA))
        prove(program, attentions=set(sites))
        fixed = fixed_nodes(program)
        known: dict[object, int | None] = {}
        blocks = {_mask_block(program, node, fixed, known) for node in sites}
        if len(blocks) > 1:
            raise UnsupportedModel(
                f"the layers' attention masks differ: block lengths {sorted(map(str, blocks))}",
                remedy="one mask for all layers",
            )
        program.stage = Stage.PLANNED
        if sites:
            (block,) = blocks
            program.shape = _with_block(program, block)
            _add_row_limit(program)
        for i, node in enumerate(sites):
            _rewrite(program, node, i)
        return len(sites)


def _with_block(program: Program, block: int | None):  # type: ignore[no-untyped-def]
    from dataclasses import replace as change

    return change(program.shape, model_block=block)


def _add_row_limit(program: Program) -> None:
    like = value(program.placeholder("row_pos"))
    with fake_mode(program):
        add_input(program, "row_limit", "step", torch.empty_like(like))


def _argument(node: Node, index: int, name: str, default: object) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _mask_block(
    program: Program, node: Node, fixed: set[Node], known: dict[object, int | None]
) -> int | None:
    """Block length of the attention's mask; None where every position sees every other."""
    where = facts(node).origin or node.name
    if _argument(node, 4, "dropout_p", 0.0) != 0.0:
        raise UnsupportedModel("attention with dropout", where=where, remedy="model.eval()")
    mask = _argument(node, 3, "attn_mask", None)
    causal = bool(_argument(node, 5, "is_causal", False))
    if mask is None:
        return 1 if causal else None
    if not isinstance(mask, Node) or mask not in fixed:
        raise UnsupportedModel(
            "the attention mask depends on the tokens",
            where=where,
            remedy="a mask of positions only: all, or block-causal",
        )
    key = same_value(mask)
    if key not in known:
        known[key] = _proven(mask, program, where)
    return known[key]


def _proven(mask: Node, program: Program, where: str) -> int | None:
    remedy = "a mask of positions only: all, or (key // n) <= (query // n)"
    try:
        block = mask_block(mask, program)
        departure = (1, 0) if block == NEITHER else first_departure(mask, program, block)
    except UnsupportedModel as error:
        raise UnsupportedModel(error.what, where=where, remedy=error.remedy or remedy) from error
    if departure is not None:
        length, row = departure
        what = "the attention mask is neither full nor block-causal"
        what += "" if block == NEITHER else f": at {length} positions, position {row} sees others"
        raise UnsupportedModel(what, where=where, remedy=remedy)
    return block


def _rewrite(program: Program, node: Node, index: int) -> None:
    q, k, v = node.args[:3]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    scale = _argument(node, 6, "scale", None)
    if scale is None:
        scale = float(value(q).shape[-1]) ** -0.5
    _check_shapes(node, q, k, v)
    row_seq, row_pos, row_limit = (
        program.placeholder(name) for name in ("row_seq", "row_pos", "row_limit")
    )
    caches = []
    for name, rows in (("keys", k), ("values", v)):
        cache = _cache(program, f"{name}_{index}", rows)
        flat = _rows(program, node, rows)
        written = insert(program, node, operators.WRITE_ROWS, cache, flat, row_seq, row_pos)
        _return_state(program, written, cache.name)
        caches.append(written)
    out = insert(
        program, node, operators.ATTEND, _rows(program, node, q), *caches, row_seq, row_limit, scale
    )
    heads, size = (int(d) for d in (value(q).shape[1], value(v).shape[-1]))
    back = insert(program, node, aten.reshape.default, out, [1, -1, heads, size])
    replace(program, node, aten.permute.default, back, [0, 2, 1, 3])


def _check_shapes(node: Node, q: Node, k: Node, v: Node) -> None:
    shapes = [value(x).shape for x in (q, k, v)]
    where = facts(node).origin or node.name
    for shape in shapes:
        if len(shape) != 4 or shape[0] != 1 or is_static(shape[2]):
            raise UnsupportedModel(
                f"attention over {tuple(map(str, shape))}, not [1, heads, sequence, size]",
                where=where,
            )
    if not shapes[0][3] == shapes[1][3] == shapes[2][3]:
        raise UnsupportedModel("queries, keys and values differ in size", where=where)
    if int(shapes[0][1]) % int(shapes[1][1]) or shapes[1][1] != shapes[2][1]:
        raise UnsupportedModel("the key heads do not divide the query heads", where=where)


def _rows(program: Program, at: Node, x: Node) -> Node:
    """[1, H, R, K] -> [R, H, K]"""
    heads, size = int(value(x).shape[1]), int(value(x).shape[3])
    turned = insert(program, at, aten.permute.default, x, [0, 2, 1, 3])
    return insert(program, at, aten.reshape.default, turned, [-1, heads, size])


def _cache(program: Program, name: str, rows: Node) -> Node:
    shape = program.shape
    heads, size = int(value(rows).shape[1]), int(value(rows).shape[3])
    with fake_mode(program):
        held = torch.empty((shape.slots, shape.positions, heads, size), dtype=value(rows).dtype)
    return add_input(program, name, "state", held, "kv")


def _return_state(program: Program, node: Node, state: str) -> None:
    result = program.result()
    (values,) = result.args
    result.args = ((*values, node),)  # type: ignore[misc]
    program.outputs.append(Output(state, state=state))
