"""One step at a time: binding, arena, native and torch launches."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import toy
from toy import MASK, Toy

from dcompile.errors import ContractError
from dcompile.runtime.artifact import open_artifact, write_artifact
from dcompile.runtime.cpu import executor as launching
from dcompile.runtime.cpu.executor import Executor
from dcompile.runtime.state import KEPT_BINDINGS


def executor(path: Path, case: Toy, code: bytes, **settings: Any) -> Executor:
    return Executor(open_artifact(toy.write(path / "toy.dcx", case, code)), **settings)


def inputs(total: int, slot: int = 0, block: int = 4) -> dict[str, npt.NDArray[Any]]:
    """All rows of one sequence whose first block begins at 0."""
    positions = np.arange(total)
    return {
        "row_seq": np.full(total, slot),
        "row_pos": positions,
        "row_limit": np.full(total, total),
        "block_seq": np.array([slot]),
        "block_pos": positions[None, :block],
        "choice_row": positions[None, :block],
        "seed": np.array([0]),
        "tick": np.array([0]),
        "threshold": np.array([0.9], np.float32),
        "temperature": np.array([0.0], np.float32),
    }


def test_a_step(tmp_path: Path, code: bytes) -> None:
    run = executor(tmp_path, Toy(batch=2), code)
    run.state["canvas"].fill(MASK)
    out = run.step(inputs(8, slot=1))
    commit, token = out["commit"][0], out["token"][0]
    assert out["confidence"].dtype == np.float32 and out["done"].tolist() == [commit.all().item()]
    assert commit.any()
    assert (run.state["canvas"][1, :4] == np.where(commit, token, MASK)).all()
    assert (run.state["canvas"][0] == MASK).all()


def test_steps_do_not_read_what_a_step_left(tmp_path: Path, code: bytes) -> None:
    for poison in (False, True):
        run = executor(tmp_path, Toy(batch=2), code, poison=poison)
        run.state["canvas"].fill(MASK)
        # A larger step, a smaller one, and the larger one again, in an arena that they share.
        tokens = [run.step(inputs(total))["token"].tolist() for total in (8, 20, 8, 32, 8)]
        if not poison:
            clean = tokens
    assert tokens == clean
    # Of the large step's arena, the small one left the end as it was poisoned.
    arena = run.bind(8, 1).arena
    assert (arena[-64:] == 0xFF).all() and not (arena[:64] == 0xFF).any()


def test_addresses_follow_the_arena(tmp_path: Path, code: bytes) -> None:
    run = executor(tmp_path, Toy(), code)
    small = run.bind(4, 1)
    assert run.bind(4, 1) is small
    large = run.bind(32, 1)
    assert large.arena is not small.arena
    assert run.bind(4, 1).arena is large.arena
    for index, buffer in enumerate(run.plan.buffers):
        if buffer.kind in ("slot", "state", "input"):
            assert large.address(index) == large.values(index).ctypes.data
            assert large.address(index) % 64 == 0
    for rows in range(1, KEPT_BINDINGS + 9):
        run.bind(rows % 32 + 1, 1)
    assert len(run.memory._bindings) <= KEPT_BINDINGS


def test_a_view_has_its_own_address(tmp_path: Path, code: bytes) -> None:
    plan = toy.plan(Toy())
    base = len(plan["buffers"]) - 1
    for name, of, shape, strides, offset in [
        ("column", 16, [{"B": 1}, 2], [4, 1], 2),
        ("last", 16 + 0, [{"B": 1}], [4], {"": 3}),
        ("inner", base + 1, [{"B": 1}], [4], 1),
    ]:
        plan["buffers"].append(
            {
                "name": name,
                "dtype": plan["buffers"][16]["dtype"],
                "shape": shape,
                "place": {"kind": "view", "of": of, "offset": offset, "strides": strides},
            }
        )
    weights = [("weight", np.zeros(3, np.float32))]
    write_artifact(tmp_path / "a", toy.manifest(Toy()), plan, weights, {"kernels/any.so": code})
    binding = Executor(open_artifact(tmp_path / "a")).bind(4, 1)
    binding.values(16)[...] = np.arange(4)
    assert [binding.values(base + k).tolist() for k in (1, 2, 3)] == [[[2, 3]], [3], [3]]
    for k in (1, 2, 3):
        assert binding.address(base + k) == binding.values(base + k).ctypes.data


def test_each_launch_has_its_time(tmp_path: Path, code: bytes) -> None:
    run = executor(tmp_path, Toy(), code)
    run.state["canvas"].fill(MASK)
    times = run.time_step(inputs(8))
    names = ["toy_embed", "toy_layer", "toy_layer", "toy_choose", "some", "done"]
    assert [name for name, _ in times] == names
    assert all(0 < seconds < 1 for _, seconds in times)
    assert (run.state["canvas"][0, :4] != MASK).any()


def test_threads(tmp_path: Path, code: bytes) -> None:
    assert executor(tmp_path, Toy(), code).threads == 1  # the model is tiny
    run = executor(tmp_path, Toy(), code, threads=3)
    before = torch.get_num_threads()
    run.state["canvas"].fill(MASK)
    run.step(inputs(8))
    assert torch.get_num_threads() == before
    assert ctypes.c_int64.in_dll(run._libraries[0], "dc_threads").value == 3


def test_equal_code_is_loaded_once(tmp_path: Path, code: bytes) -> None:
    first = executor(tmp_path, Toy(), code)
    held = len(launching._libraries)
    second = executor(tmp_path, Toy(block=8), code)
    assert len(launching._libraries) == held and first._libraries == second._libraries
    other = executor(tmp_path, Toy(), code + b"\0")
    assert other._libraries != first._libraries


def test_refuses_an_input_of_another_shape(tmp_path: Path, code: bytes) -> None:
    run = executor(tmp_path, Toy(), code)
    with pytest.raises(ValueError, match="row_limit"):
        run.step({**inputs(8), "row_limit": np.zeros(7, np.int64)})


def torch_plan(launches: list[dict[str, Any]], extra: list[dict[str, Any]]) -> dict[str, Any]:
    """A plan without native code: `done` once nothing is the mask id."""
    plan = toy.plan(Toy())
    plan["buffers"] += extra
    plan["launches"] = [{"where": "aten", "name": "x", **launch} for launch in launches]
    plan["regions"] = [{"kind": "aten", "start": 0, "end": len(launches)}]
    plan["outputs"] = {"done": plan["outputs"]["done"]}
    return plan


def test_a_plan_of_torch_operators_alone(tmp_path: Path) -> None:
    """Embedding, linear, choice: several results, sizes, dtypes, lists, writes in place."""
    rows, B = {"R": 1}, {"B": 1}
    places: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
        "ids": ("i64", [rows], {"kind": "slot", "slot": 0}),
        "x": ("f32", [rows, 3], {"kind": "slot", "slot": 1}),
        "best": ("f32", [rows, 1], {"kind": "slot", "slot": 2}),
        "which": ("i64", [rows, 1], {"kind": "slot", "slot": 3}),
        "table": ("f32", [23, 3], {"kind": "constant", "tensor": "t"}),
        "flat": ("i64", [rows], {"kind": "view", "of": 26, "offset": 0, "strides": [1]}),
        "range": ("i32", [rows], {"kind": "slot", "slot": 4}),
    }
    extra = [
        {"name": name, "dtype": dtype, "shape": shape, "place": place}
        for name, (dtype, shape, place) in places.items()
    ]
    index = {buffer["name"]: i for i, buffer in enumerate([*toy.plan(Toy())["buffers"], *extra])}
    b = {name: {"b": i} for name, i in index.items()}
    at = [b["row_seq"], b["row_pos"]]

    def call(kernel: str, writes: list[str | None], *args: Any, **kwargs: Any) -> dict[str, Any]:
        written = [None if name is None else index[name] for name in writes]
        return {"kernel": kernel, "args": list(args), "kwargs": kwargs, "writes": written}

    i32 = {"dtype": {"dtype": "i32"}, "device": {"device": "cpu"}}
    launches = [
        call("aten.index.Tensor", ["ids"], b["canvas"], at),
        call("aten.embedding.default", ["x"], b["table"], b["ids"]),
        call("aten.topk.default", ["best", "which"], b["x"], 1),
        call("aten.arange.start_step", ["range"], 0, {"i": rows}, **i32),
        call("aten.index_put_.default", ["canvas"], b["canvas"], at, b["flat"]),
        call("aten.full.default", ["done"], [{"i": B}], True, dtype={"dtype": "bool"}),
        call("aten.topk.default", [None, "which"], b["x"], 1),
    ]
    values = np.random.default_rng(0).random((23, 3), np.float32)
    weights = [("weight", np.zeros(3, np.float32)), ("t", values)]
    manifest = toy.manifest(Toy())
    manifest["kernels"]["isas"]["any"]["files"] = []
    write_artifact(tmp_path / "a", manifest, torch_plan(launches, extra), weights, {})
    run = Executor(open_artifact(tmp_path / "a"), poison=True)
    run.state["canvas"][0] = np.arange(32) % 23
    before = run.state["canvas"][0].copy()
    out = run.step(inputs(8))
    assert out["done"].tolist() == [True]
    wanted = values[before[:8]].argmax(-1)
    assert (run.state["canvas"][0] == np.concatenate([wanted, before[8:]])).all()
    assert run.bind(8, 1).values(index["range"]).tolist() == list(range(8))
    assert len(run.time_step(inputs(8))) == 7


def test_a_result_of_another_shape_is_an_error(tmp_path: Path) -> None:
    launches = [{"kernel": "aten.full.default", "args": [[3], True], "writes": [21]}]
    manifest = toy.manifest(Toy())
    manifest["kernels"]["isas"]["any"]["files"] = []
    weights = [("weight", np.zeros(3, np.float32))]
    write_artifact(tmp_path / "a", manifest, torch_plan(launches, []), weights, {})
    run = Executor(open_artifact(tmp_path / "a"))
    with pytest.raises(ContractError, match=r"\[3\] for a buffer of \[1\]"):
        run.step(inputs(8))
