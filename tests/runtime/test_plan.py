"""What is checked of a plan before anything is allocated or launched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Toy

from dcompile.errors import ArtifactError
from dcompile.runtime.plan import Plan, Size

Json = dict[str, Any]


def view(of: int, shape: list[Any], strides: list[Any], offset: Any = 0) -> Callable[[Json], None]:
    place = {"kind": "view", "of": of, "offset": offset, "strides": strides}
    dtype = toy.plan(Toy())["buffers"][of]["dtype"] if of < 23 else "i64"
    buffer = {"name": "view", "dtype": dtype, "shape": shape, "place": place}
    return lambda plan: plan["buffers"].append(buffer)


def put(*keys: Any) -> Callable[[Json], None]:
    *path, last, value = keys

    def change(plan: Json) -> None:
        target: Any = plan
        for key in path:
            target = target[key]
        target[last] = value

    return change


def drop(key: str) -> Callable[[Json], None]:
    return lambda plan: plan.pop(key) and None


def read(change: Callable[[Json], None]) -> Plan:
    text = toy.plan(Toy(batch=2))
    change(text)
    return Plan.read(text, "plan.json")


# Of the toy's buffers: 0 canvas i64 [2, 32], 13 h0 i64 [R], 16 token i64 [B, 4], 22 a weight.
@pytest.mark.parametrize(
    "change",
    [
        lambda plan: None,
        view(0, [2, 8], [32, 1], 24),
        view(13, [{"R": 1}], [1]),
        view(16, [{"B": 1}], [4], 3),
        view(16, [{"B": 4}], [1]),
        view(16, [{"B": 1}, 0], [4, 1], 4),
        view(0, [], [], 63),
        put("buffers", 13, "shape", 0, {"R": 64, "B": 2, "": 5}),
        put("launches", 0, "origin", "unknown fields are kept"),
        put("launches", 4, "writes", [None]),
    ],
)
def test_takes(change: Callable[[Json], None]) -> None:
    read(change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *[(drop(key), "a field is missing") for key in toy.plan(Toy())],
        (put("buffers", 3), "another type"),
        (put("symbols", ["R", "S"]), "unknown symbols"),
        (put("sizes", {"N": 1, "L": 32}), "sizes N, L and n"),
        (put("sizes", "N", 0), "sizes N, L and n"),
        (put("sizes", "L", -1), "no count"),
        (put("slots", 1 << 60), "no count"),
        (put("slots", 7), "slot 7 of 7"),
        (put("buffers", 0, "dtype", "i128"), "unknown dtype"),
        (put("buffers", 0, "place", {"kind": "gpu"}), "unknown place"),
        (put("buffers", 13, "shape", 0, {"S": 1}), "not affine"),
        (put("buffers", 13, "shape", 0, 1.5), "not affine"),
        (put("buffers", 13, "shape", 0, True), "not affine"),
        (put("buffers", 13, "shape", 0, {"R": "1"}), "not affine"),
        (put("buffers", 13, "shape", 0, {"R": 1, "": -2}), "shape"),
        (put("buffers", 13, "shape", 0, {"R": 1 << 47}), "shape"),
        (put("buffers", 0, "shape", 0, {"B": 1}), "state depends on the rows"),
        (put("buffers", 0, "place", "holds", "keys"), "a state that holds 'keys'"),
        (view(0, [2, 9], [32, 1], 24), "ends outside canvas"),
        (view(0, [], [], 64), "ends outside canvas"),
        (view(0, [2], [1], -1), "ends outside"),
        (view(0, [2], [-1], 5), "ends outside"),
        (view(13, [{"R": 1, "": 1}], [1]), "ends outside h0"),
        (view(16, [{"B": 1}], [4], 4), "ends outside token"),
        (view(23, [1], [1]), "a view of itself or of nothing"),
        (view(99, [1], [1]), "a view of itself or of nothing"),
        (view(0, [1], []), "lacks strides"),
        (put("launches", 0, "where", "gpu"), "neither native nor as aten"),
        (put("launches", 0, "writes", [99]), "writes buffer 99"),
        (put("launches", 0, "writes", [22]), "writes to a weight"),
        (put("launches", 0, "args", 0, {"b": 99}), "cannot read argument"),
        (put("launches", 0, "args", 0, {"b": -1}), "cannot read argument"),
        (put("launches", 0, "args", 0, {"b": 1, "i": 2}), "cannot read argument"),
        (put("launches", 0, "args", 0, {"f": "x"}), "cannot read argument"),
        (put("launches", 0, "args", 0, {"i": "R"}), "not affine"),
        (put("launches", 0, "args", 0, 3), "no buffer, size or number"),
        (put("launches", 4, "args", 1, {"dtype": "f8"}), "cannot read argument"),
        (put("launches", 4, "kwargs", {"x": [{"b": 99}]}), "cannot read argument"),
        (put("regions", 0, "end", 5), "has others in it|one after another"),
        (put("regions", [{"kind": "native", "start": 0, "end": 4}]), "one after another"),
        (put("regions", [{"kind": "native", "start": 0, "end": 99}]), "one after another"),
        (put("inputs", "row_seq", 99), "buffer 99 is not there"),
        (put("inputs", "row_seq", 0), "placed as state"),
        (put("inputs", {}), "an input buffer has no input"),
        (put("state", {}), "a state buffer has no state"),
        (put("outputs", "done", None), "no count"),
    ],
)
def test_refuses(change: Callable[[Json], None], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        read(change)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_other_value_is_refused_or_sound(data: st.DataObject) -> None:
    """No JSON in place of a part of the plan gives anything but a plan or an ArtifactError."""
    text = copy.deepcopy(toy.plan(Toy()))
    at: Any = text
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(VALUES)
    try:
        plan = Plan.read(text, "plan.json")
        plan.check_weights({"weight": 12})
    except ArtifactError:
        return
    assert isinstance(plan, Plan)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(-9, 9))
def test_sizes_are_affine(R: int, B: int, c: int) -> None:
    assert Size(64, 2, c)(R, B) == 64 * R + 2 * B + c
