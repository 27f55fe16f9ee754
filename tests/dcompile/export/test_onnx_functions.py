"""Bodies in ATen alone, and the functions of ONNX, against the operators that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from dcompile.export.onnx_model import OPSET, add_functions
from dcompile.export.step import BODIES
from dcompile.ir import operators

ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}


def infos(letter: str, tensors: Any) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(f"{letter}{i}", ELEMENTS[t.dtype], list(t.shape))
        for i, t in enumerate(tensors)
    ]


def in_onnx(name: str, inputs: list[Tensor], like: Any, **attributes: Any) -> list[Tensor]:
    """Run one function alone, with outputs declared to be like those."""
    ins, outs = infos("x", inputs), infos("y", (like,) if isinstance(like, Tensor) else like)
    names = [o.name for o in outs]
    node = helper.make_node(name, [i.name for i in ins], names, domain="dcompile", **attributes)
    graph = helper.make_graph([node], "one", ins, outs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("dcompile", 1)]
    model = onnx_ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    add_functions(model)
    proto = onnx.shape_inference.infer_shapes(onnx_ir.to_proto(model), check_type=True)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    found = session.run(names, {f"x{i}": t.numpy() for i, t in enumerate(inputs)})
    return [torch.from_numpy(x) for x in found]


def same(found: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    found, wanted = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=20 * tolerance, atol=tolerance)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 4), (2, 9, 3, 4, 2, 6), (3, 7, 7, 6, 2, 10)])
def test_attention(sizes: tuple[int, ...], seed: int) -> None:
    batch, length, window, heads, groups, size = sizes
    torch.manual_seed(seed)
    q = torch.randn(batch * window, heads, size)
    keys, values = torch.randn(2, batch, length, groups, size)
    row_seq = torch.arange(batch).repeat_interleave(window)
    limit = torch.randint(1, length + 1, (batch * window,))
    wanted = operators.ATTEND(q, keys, values, row_seq, limit, 0.3)
    same(BODIES[operators.ATTEND](q, keys, values, row_seq, limit, 0.3), wanted)
    same(in_onnx("attend", [q, keys, values, limit], wanted, scale=0.3), wanted)


@pytest.mark.parametrize("norms", ["norm", "plain", "q_norm", "k_norm"])
def test_norm_rope_write(norms: str) -> None:
    torch.manual_seed(1)
    batch, length, window, heads, groups, size, rot = 2, 11, 5, 6, 3, 8, 4
    qkv = torch.randn(batch * window, (heads + 2 * groups) * size)
    keys, values = torch.randn(2, batch, length, groups, size)
    cos, sin = torch.randn(2, length, rot)
    row_seq = torch.arange(batch).repeat_interleave(window)
    row_pos = torch.cat([torch.randperm(length)[:window] for _ in range(batch)])
    q_norm = torch.rand(size) if norms in ("norm", "q_norm") else None
    k_norm = torch.rand(size) if norms in ("norm", "k_norm") else None
    rest = [cos, sin, row_seq, row_pos, keys, values]
    wanted = operators.NORM_ROPE_WRITE(qkv, q_norm, k_norm, *rest, heads, 1e-5)
    same(BODIES[operators.NORM_ROPE_WRITE](qkv, q_norm, k_norm, *rest, heads, 1e-5), wanted)
    given = [qkv, *(t for t in (q_norm, k_norm) if t is not None), *rest]
    eps = {} if norms == "plain" else {"eps": 1e-5}
    same(in_onnx(f"{norms}_rope_write", given, wanted, heads=heads, **eps), wanted)


@pytest.mark.parametrize("score", operators.SCORES)
def test_the_body_of_route_knows_every_score(score: str) -> None:
    logits, bias = torch.randn(17, 16), torch.randn(16)
    given = (logits, bias, 3, score, 1, 1, False, 2.5)
    for found, wanted in zip(BODIES[operators.ROUTE](*given), operators.ROUTE(*given), strict=True):
        same(found, wanted)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route(score: str, groups: int, kept: int, biased: bool, seed: int) -> None:
    torch.manual_seed(seed)
    # Few different values: ties go to the lowest index everywhere.
    logits = torch.randint(-2, 3, (17, 16)).float() if seed else torch.randn(17, 16)
    logits[3, 5] = float("nan")
    bias = torch.randn(16) if biased else None
    wanted = operators.ROUTE(logits, bias, 3, score, groups, kept, bool(seed), 2.5)
    same(
        BODIES[operators.ROUTE](logits, bias, 3, score, groups, kept, bool(seed), 2.5)[1], wanted[1]
    )
    said = {"top_k": 3, "sigmoid": int(score == "sigmoid"), "groups": groups, "kept_groups": kept}
    given = [logits, torch.zeros(()) if bias is None else bias]
    found = in_onnx("route", given, wanted, renormalize=seed, scale=2.5, **said)
    same(found[1], wanted[1])
    rows = [i for i in range(17) if i != 3]
    same(found[0][rows], wanted[0][rows])
    same(
        BODIES[operators.ROUTE](logits, bias, 3, score, groups, kept, bool(seed), 2.5)[0][rows],
        wanted[0][rows],
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", operators.ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(1, 5, 33, 7, 2), (19, 8, 16, 12, 3)])
def test_experts(sizes: tuple[int, ...], activation: str, biased: bool) -> None:
    rows, experts, hidden, inner, k = sizes
    torch.manual_seed(2)
    x, weights = torch.randn(rows, hidden), torch.rand(rows, k)
    chosen = torch.stack([torch.randperm(experts)[:k] for _ in range(rows)]).int()
    gate_up = torch.randn(experts, 2 * inner, hidden) * 0.2
    down = torch.randn(experts, hidden, inner) * 0.2
    biases = [torch.randn(experts, 2 * inner), torch.randn(experts, hidden)] if biased else []
    given = [x, weights, chosen, gate_up, down, *biases]
    wanted = operators.MOE_FFN(*given, *([] if biased else [None, None]), activation)
    same(
        BODIES[operators.MOE_FFN](*given, *([] if biased else [None, None]), activation),
        wanted,
        1e-5,
    )
    name = f"moe_ffn{'_biased' if biased else ''}_{activation}"
    same(in_onnx(name, given, wanted), wanted, 1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choice(temperature: float) -> None:
    torch.manual_seed(3)
    batch, n, vocab, mask = 2, 5, 37, 36
    logits = torch.randn(batch, n, vocab) * 3
    logits[0, 1] = float("-inf")
    logits[0, 1, mask] = 1.0
    logits[1, 2, 7] = float("nan")
    logits[1, 3, 4] = logits[1, 3, 9] = 20.0
    live = torch.rand(batch, n) > 0.2
    clock = [
        torch.tensor([temperature, 0.0]),
        torch.tensor([-5, 1 << 40]),
        torch.tensor([3, 1 << 33]),
        torch.arange(batch * n).reshape(batch, n),
    ]
    asked = torch.randint(0, vocab, (batch, n, 3))
    wanted = operators.CHOOSE_ASKED(logits, live, *clock, asked, mask)
    same(BODIES[operators.CHOOSE_ASKED](logits, live, *clock, asked, mask), wanted)
    same(in_onnx("choose_asked", [logits, live, *clock, asked], wanted, mask_id=mask), wanted)
    wanted = operators.CHOOSE(logits, live, *clock, mask)
    same(BODIES[operators.CHOOSE](logits, live, *clock, mask), wanted)
    same(in_onnx("choose", [logits, live, *clock], wanted, mask_id=mask), wanted)


SMALL: list[tuple[str, Callable[..., Any], list[Tensor], dict[str, Any]]] = [
    ("silu_mul", operators.SILU_MUL, [torch.randn(3, 5), torch.randn(3, 5)], {}),
    (
        "add_rms_norm",
        operators.ADD_RMS_NORM,
        [torch.randn(3, 5), torch.randn(3, 5), torch.rand(5)],
        {"eps": 1e-5},
    ),
    (
        "write_rows",
        operators.WRITE_ROWS,
        [
            torch.randn(2, 4, 3, 5),
            torch.randn(3, 3, 5),
            torch.tensor([0, 1, 1]),
            torch.tensor([3, 0, 2]),
        ],
        {},
    ),
]


@pytest.mark.parametrize(("name", "operator", "given", "said"), SMALL, ids=[s[0] for s in SMALL])
def test_the_rest(name: str, operator: Any, given: list[Tensor], said: dict[str, Any]) -> None:
    wanted = operator(*given, *said.values())
    same(BODIES[operator](*given, *said.values()), wanted)
    same(in_onnx(name, given, wanted, **said), wanted)


def test_a_norm_without_weight() -> None:
    x, r = torch.randn(2, 3, 5)
    wanted = operators.ADD_RMS_NORM(x, r, None, 1e-5)
    same(in_onnx("add_rms_normalize", [x, r], wanted, eps=1e-5), wanted)
    wanted = torch.nn.functional.rms_norm(x, (5,), None, 1e-5)
    same(in_onnx("rms_normalize", [x], wanted, eps=1e-5), wanted)
