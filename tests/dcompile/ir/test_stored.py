"""A program as JSON: what is read back computes the same, and nothing else can be said in it."""

from __future__ import annotations

import json

import pytest
import torch
from check import SHAPE, run, small_program
from torch import Tensor

from dcompile.errors import ArtifactError
from dcompile.ir import operators, stored
from dcompile.ir.program import Program


def program() -> Program:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total, normal = operators.ADD_RMS_NORM(torch.nn.functional.linear(x, w), x, None, 1e-5)
        far = torch.where(total > 0, total, float("-inf"))
        parts = torch.cat((far, normal.to(torch.bfloat16).float()), 1).split([5, 9], 1)
        return *parts, x.new_zeros((x.shape[0], 2), dtype=torch.int32)

    return small_program(fn, {"x": torch.randn(6, 7)}, {"w": torch.randn(7, 7)})


def text() -> dict[str, object]:
    out: dict[str, object] = json.loads(json.dumps(stored.dump(program()), allow_nan=False))
    return out


def test_what_is_read_back_computes_the_same() -> None:
    original = program()
    back = stored.load(text(), "here")
    tensors = {"x": torch.randn(11, 7), "w": torch.randn(7, 7)}
    wanted = run(original, tensors)
    found = back.module(*(tensors[item.name] for item in back.inputs))
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert [(i.name, i.kind, i.shape) for i in back.inputs] == [
        ("w", "weight", (7, 7)),
        ("x", "step", ({"R": 1}, 7)),
    ]
    assert back.sizes == {"N": SHAPE.slots, "L": SHAPE.positions, "n": SHAPE.block_length}


@pytest.mark.parametrize(
    "call",
    [
        "os.system.default",
        "aten.add_.Tensor",
        "aten.nothing.default",
        "aten.add.__init__",
        "prim.device.default",
        "eval",
        "aten.__class__.__base__",
    ],
)
def test_no_other_call_can_be_said(call: str) -> None:
    hostile = text()
    hostile["nodes"][0]["call"] = call  # type: ignore[index]
    with pytest.raises(ArtifactError, match="stored program"):
        stored.load(hostile, "here")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 99),
        ("inputs", [{"name": "x"}]),
        ("nodes", [{"name": "a b", "call": "getitem", "args": []}]),
        ("nodes", [{"name": "a", "call": "getitem", "args": [{"node": "missing"}, 0]}]),
        ("nodes", [{"name": "a", "call": "getitem", "args": [{"torch": "load"}]}]),
        ("nodes", [{"name": "a", "call": "getitem", "args": [{"eval": "1"}]}]),
        ("nodes", None),
        ("outputs", []),
        ("sizes", {"N": "x"}),
    ],
)
def test_a_broken_text_is_a_named_error(key: str, value: object) -> None:
    with pytest.raises(ArtifactError, match="stored program"):
        stored.load({**text(), key: value}, "here")
