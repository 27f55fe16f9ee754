"""Variants survive JSON; grid expressions mean what they say."""

from __future__ import annotations

import json

import pytest

from dcompile.codegen.triton.variant import (
    Number,
    Operand,
    Parameter,
    Step,
    Variant,
    evaluate,
    pointer,
    unaligned,
)

VARIANT = Variant(
    name="toy_bf16",
    kernel="toy:kernel",
    arguments=(pointer("x", "bf16"), Parameter("rows", "i32")),
    constants=(("bias", None), ("EPILOGUE", "toy:identity"), ("BLOCK", 64)),
    grid=({"cdiv": [{"R": 8, "": 3}, 16]}, 4, 1),
    num_warps=4,
    num_stages=2,
)


def test_a_variant_survives_json() -> None:
    again = Variant.from_json(json.loads(json.dumps(VARIANT.to_json())))
    assert again == VARIANT and hash(again) == hash(VARIANT)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (7, 7),
        ({"R": 2, "B": 3, "": 5}, 2 * 10 + 3 * 4 + 5),
        ({"cdiv": [{"R": 1, "": 1}, 4]}, 3),
        ({"min": [64, {"R": 8}]}, 64),
        ({"max": [64, {"R": 8}]}, 80),
        ({"sum": [{"min": [6, {"R": 1}]}, {"cdiv": [{"B": 1}, 3]}, 1]}, 9),
        ({"mul": [{"cdiv": [{"R": 1}, 16]}, 3]}, 3),
    ],
)
def test_expressions(expression: object, value: int) -> None:
    assert evaluate(expression, {"R": 10, "B": 4}) == value  # type: ignore[arg-type]


def test_a_step_binds_every_argument() -> None:
    Step(VARIANT, (Operand("x"), Number({"R": 1})))
    with pytest.raises(AssertionError, match="toy_bf16"):
        Step(VARIANT, (Operand("x"),))


def test_unaligned_pointers_are_another_variant() -> None:
    moved = unaligned(VARIANT, frozenset({"x"}))
    assert moved.name != VARIANT.name and not moved.arguments[0].aligned
