"""The toy model of the runtime's tests as a CUDA artifact: its kernels run on the fake driver."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import toy
from fake_cuda import FakeCuda, Launched, make_cubin
from toy import Toy

from dcompile.runtime.artifact import open_artifact, write_artifact
from dcompile.runtime.cuda.executor import CudaExecutor
from dcompile.runtime.decode.loop import Runner

POINTERS = {"i64": "*i64", "f32": "*fp32", "bool": "*i1", "i32": "*i32"}
ADVANCE = ("*i1", "*i64", "*i64", "*i32", "*i64", "*i32", "*i32", "*i32", "*i32", "i32")

LOOP = ("finished", "performed", "turn", "limit", "go", "wanted")


def plan(case: Toy) -> dict[str, Any]:
    """The toy's plan with every launch on the GPU, a clock more, and the end of a turn."""
    out = toy.plan(case)
    buffers = out["buffers"]
    names = {buffer["name"]: at for at, buffer in enumerate(buffers)}
    for name, dtype, shape, place in (
        ("iteration", "i64", [{"B": 1}], {"kind": "input"}),
        ("ticket", "i32", [{"B": 1, "": 1}], {"kind": "zeroed"}),
    ):
        names[name] = len(buffers)
        buffers.append({"name": name, "dtype": dtype, "shape": shape, "place": place})
    out["inputs"]["iteration"] = names["iteration"]
    grids = {"toy_choose": [{"B": 1}, 1, 1], "toy_done": [{"B": 1}, 1, 1]}
    launches = out["launches"][:4]
    launches.append(
        {
            "name": "done",
            "kernel": "toy_done",
            "args": [
                *({"b": names[name]} for name in ("done", "open", "ticket")),
                {"i": {"B": 1}},
                {"i": case.block},
            ],
            "writes": [names["done"]],
        }
    )
    for launch in launches:
        launch["where"] = "cuda"
        launch["grid"] = grids.get(launch["kernel"], [{"cdiv": [{"R": 1}, 4]}, 1, 1])
    out["launches"] = launches
    out["regions"] = [{"kind": "cuda", "start": 0, "end": len(launches)}]
    out["loop"] = {
        "kernel": "advance",
        "grid": [1, 1, 1],
        "args": [
            *({"b": names[name]} for name in ("done", "iteration", "tick")),
            *({"loop": name} for name in LOOP),
            {"i": {"B": 1}},
        ],
    }
    return out


def types_of(text: dict[str, Any], launch: dict[str, Any]) -> list[str]:
    if launch["kernel"] == "advance":
        return [*ADVANCE[: len(launch["args"]) - 1], "i32"]
    buffers = text["buffers"]
    return [POINTERS[buffers[a["b"]]["dtype"]] if "b" in a else "i32" for a in launch["args"]]


def table(text: dict[str, Any], arch: int = 90) -> tuple[dict[str, Any], dict[str, bytes]]:
    """kernels.json and the cubins of a plan."""
    kernels: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for launch in (*text["launches"], text["loop"]):
        name, types = launch["kernel"], types_of(text, launch)
        sizes = [8 if type_[0] == "*" else 4 for type_ in types] + [8, 8]
        shared = 65536 if name == "toy_layer" else 0
        parameters, at = [], 0
        for ordinal, size in enumerate(sizes):
            at += -at % size
            parameters.append([ordinal, at, size])
            at += size
        file = f"kernels/sm_{arch}/{name}.cubin"
        files[file] = make_cubin(name, sizes, arch=arch, registers=40, static_shared=16)
        kernels[name] = {
            "kernel": f"toy:{name}",
            "arguments": [
                {"name": f"a{at}", "type": type_, "aligned": type_[0] == "*"}
                for at, type_ in enumerate(types)
            ],
            "constants": [],
            "num_warps": 2,
            "num_stages": 1,
            "binaries": {
                f"sm_{arch}": {
                    "file": file,
                    "entry": name,
                    "registers": 40,
                    "stack": 0,
                    "static_shared": 16,
                    "dynamic_shared": shared,
                    "warps": 2,
                    "scratch": 0,
                    "parameters": parameters,
                    "instructions": {},
                }
            },
        }
    return {"triton": "3.7.1", "kernels": kernels}, files


Change = Callable[[dict[str, Any], dict[str, Any], dict[str, bytes]], None]


def write(path: Path, case: Toy, change: Change | None = None, arch: int = 90) -> Path:
    """An artifact; `change` may damage plan, table and files before they are written."""
    text = plan(case)
    kernels, files = table(text, arch)
    if change is not None:
        change(text, kernels, files)
    manifest = toy.manifest(case)
    manifest |= {"target": "cuda", "kernels": {"table": "kernels.json", "architectures": [arch]}}
    weights = [("weight", np.array([1, 2, 3], np.float32))]
    files = {**files, "kernels.json": json.dumps(kernels).encode()}
    write_artifact(path, manifest, text, weights, files)
    return path


class Kernels(dict[str, Any]):
    """The toy's functions, called with what a launch was given; `launched` keeps every one of them."""

    def __init__(self, case: Toy, library: Path) -> None:
        self.launched: list[tuple[str, tuple[int, int, int], int, int]] = []
        code = ctypes.CDLL(str(library))
        text = plan(case)
        for launch in text["launches"][:4]:
            types = types_of(text, launch)
            self[launch["kernel"]] = self._noted(_native(getattr(code, launch["kernel"]), types))
        self["toy_done"] = self._noted(_done)
        self["advance"] = self._noted(lambda launch: advance(launch, case.batch))

    def _noted(self, kernel: Callable[[Launched], None]) -> Callable[[Launched], None]:
        def run(launch: Launched) -> None:
            self.launched.append((launch.name, launch.grid, launch.threads, launch.shared))
            kernel(launch)

        return run


def _native(function: Any, types: list[str]) -> Callable[[Launched], None]:
    def run(launch: Launched) -> None:
        values = [
            launch.value(at, ctypes.c_int64 if type_[0] == "*" else ctypes.c_int32)
            for at, type_ in enumerate(types)
        ]
        assert launch.value(len(types), ctypes.c_uint64) == 0  # global scratch
        assert launch.value(len(types) + 1, ctypes.c_uint64) == 0  # profile scratch
        function((ctypes.c_int64 * len(values))(*values))

    return run


def _done(launch: Launched) -> None:
    count, block = launch.value(3, ctypes.c_int32), launch.value(4, ctypes.c_int32)
    ticket = launch.array(2, np.int32, count + 1)
    assert not ticket.any()
    open_ = launch.array(1, np.bool_, count, block)
    launch.array(0, np.bool_, count)[:] = ~open_.any(1)


def advance(launch: Launched, slots: int, asked: bool = True) -> None:
    """The contract of docs/formats.md, one statement each; older ones were not `asked` by the host."""
    count = launch.value(9 if asked else 8, ctypes.c_int32)
    done = launch.array(0, np.bool_, count)
    clocks = [launch.array(at, np.int64, count) for at in (1, 2)]
    finished = launch.array(3, np.int32, slots)[:count]
    performed = launch.array(4, np.int64, slots)[:count]
    turn, limit, go = (launch.array(at, np.int32, 1) for at in (5, 6, 7))
    wanted = asked and launch.array(8, np.int32, 1)[0]
    performed += finished == 0
    finished |= done
    turn += 1
    go[0] = not finished.any() and turn[0] < limit[0] and not wanted
    for clock in clocks:
        clock += finished == 0


def runner(path: Path, fake: FakeCuda, **settings: Any) -> Runner:
    artifact = open_artifact(path)
    return Runner(artifact, CudaExecutor(artifact, fake.device(), **settings))
