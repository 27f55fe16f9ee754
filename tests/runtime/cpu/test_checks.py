"""What a hostile plan may not do with honest code: each of these would touch foreign memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from toy import Toy

from dcompile.errors import ArtifactError
from dcompile.runtime.cpu.abi import read_kernels
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.writing import seal

Json = dict[str, Any]


def load(folder: Path, code: bytes, change: Callable[[Json], None], **body: Any) -> Runner:
    """The toy with its plan changed by somebody who seals what he changed."""
    path = toy.write(folder / "a", Toy(batch=2), code)
    plan = toy.plan(Toy(batch=2))
    change(plan)
    data = json.dumps(plan).encode()
    (path / "plan.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text()) | body
    claim = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest["files"]["plan.json"] = claim
    manifest["sha256"] = seal(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return Runner.load(path)


def argument(launch: int, at: int, value: Any) -> Callable[[Json], None]:
    return lambda plan: plan["launches"][launch]["args"].__setitem__(at, value)


def shape(buffer: int, value: list[Any]) -> Callable[[Json], None]:
    return lambda plan: plan["buffers"][buffer].update(shape=value)


def slot(buffer: int, value: int) -> Callable[[Json], None]:
    return lambda plan: plan["buffers"][buffer]["place"].update(slot=value)


def swap_launches(plan: Json) -> None:
    plan["launches"][0], plan["launches"][1] = plan["launches"][1], plan["launches"][0]


def drop_argument(plan: Json) -> None:
    plan["launches"][0]["args"].pop()


def through_a_view(plan: Json) -> None:
    place = {"kind": "view", "of": 0, "offset": 1, "strides": [32, 1]}
    plan["buffers"].append({"name": "v", "dtype": "i64", "shape": [1, 31], "place": place})
    argument(0, 1, {"b": len(plan["buffers"]) - 1})(plan)


# 0 canvas, 1 2 keys, 3 row_seq 4 row_pos 5 row_limit 6 block_pos 7 choice_row 8 block_seq,
# 13 h0 14 h1 15 h2 in slots 0 1 0, 16 token, 22 a weight; launches embed, layer, layer, choose.
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (argument(0, 0, {"b": 22}), "is f32, not i64"),
        (argument(0, 4, {"i": {"R": 2}}), "has 1 elements, its kernel touches 2"),
        (argument(0, 4, {"i": {"R": 1, "": 1}}), "its kernel touches"),
        (argument(0, 4, {"i": {"R": -1, "": 9}}), "negative"),
        (argument(0, 5, {"i": 33}), "argument canvas has 64 elements"),
        (argument(0, 5, {"i": 16}), "holds numbers below 32, its kernel takes those below 16"),
        (argument(0, 5, {"f": 32.0}), "another kind"),
        (argument(0, 1, {"b": None}), "canvas is null"),
        (argument(0, 2, {"b": 4}), "row_seq holds numbers below 32"),
        (argument(1, 5, {"b": 3}), None),
        (argument(1, 4, {"b": 5}), "row_pos|keys|touches"),
        (argument(3, 8, {"b": 6}), "choice_row holds numbers below 32"),
        (argument(3, 13, {"i": {"B": 2}}), "touches"),
        (argument(3, 16, {"i": 1}), "break V >= 2"),
        (shape(13, [1]), "argument h has 1 elements"),
        (shape(13, [{"R": 1, "B": -1, "": 2}]), "shrinks as rows are added"),
        (shape(13, [{"R": 1}, {"R": 1}]), "two of its axes"),
        (slot(14, 0), "writes over h0, which it reads"),
        (slot(17, 2), "two values to slot 2"),
        (slot(21, 2), "output 'token' is overwritten"),
        (slot(15, 1), "writes over h1"),
        (swap_launches, "reads h0, which is overwritten or not computed"),
        (drop_argument, "it has 5 arguments, its kernel takes 6"),
        (through_a_view, "argument canvas has 63 elements"),
        (lambda plan: plan["launches"][0].update(kernel="dc_set_threads"), "does not say"),
        (lambda plan: plan["sizes"].update(L=1 << 30), "too large"),
        (shape(3, [{"R": 2}]), "'row_seq' has another shape"),
        (shape(21, [{"B": 2}]), "'done' has another shape|gave"),
    ],
)
def test_a_plan_cannot_reach_outside(
    change: Callable[[Json], None], words: str | None, tmp_path: Path, code: bytes
) -> None:
    if words is None:  # a smaller limit reads fewer keys: wrong, and harmless
        load(tmp_path, code, change)
        return
    with pytest.raises(ArtifactError, match=words):
        load(tmp_path, code, change)


def test_code_of_format_1_need_not_describe_itself(tmp_path: Path, code: bytes) -> None:
    renamed = code.replace(b"dc_abi\0", b"dc_iba\0")
    assert renamed != code
    with pytest.raises(ArtifactError, match="does not say what the kernel touches"):
        load(tmp_path, renamed, lambda plan: None)
    old = load(tmp_path, renamed, lambda plan: None, format=1)
    assert old.generate([[1]], gen_length=4)[0].all_tokens == toy.decode(Toy(), [1], 4)[0]


def test_unsafe_operators_are_refused(tmp_path: Path, code: bytes) -> None:
    for kernel in ("aten.set_.source_Tensor", "aten.from_file.default", "aten.any.all_out"):
        with pytest.raises(ArtifactError, match="no operator"):
            load(tmp_path, code, lambda plan, k=kernel: plan["launches"][4].update(kernel=k))


def test_a_refusal_of_torch_has_our_name(tmp_path: Path, code: bytes) -> None:
    runner = load(tmp_path, code, argument(4, 1, 9))
    with pytest.raises(ArtifactError, match="torch refuses"):
        runner.generate([[1]], gen_length=4)


@pytest.mark.parametrize("text", ["k x:f32[R", "k R; R~3", "k >"])
def test_a_description_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"no (argument|rule) of a kernel"):
        read_kernels(text)


def test_extents_are_products_of_sums() -> None:
    text = "k w:bf16[E,{2*F,D}] g:f32[R*P+F-P] ?? E F D R P".replace(" ??", "")
    kernel = read_kernels(text)["k"]
    sizes = {"E": 3, "F": 5, "D": 7, "R": 4, "P": 11}
    assert [p.elements(sizes) for p in kernel.parameters[:2]] == [3 * 32 * 8, 3 * 11 + 5]
