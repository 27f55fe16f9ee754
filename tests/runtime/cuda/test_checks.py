"""What is checked before a kernel runs: the driver, the GPU, the artifact's table against its cubins."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_toy
import pytest
from fake_cuda import FakeCuda, make_cubin
from hypothesis import given
from hypothesis import strategies as st
from toy import Toy

from dcompile.cubin import read_cubin
from dcompile.errors import ArtifactError, DeviceError, WrongArchitecture
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.cuda import code, driver
from dcompile.runtime.cuda.driver import CopyNode, Driver, GraphNode, KernelNode
from dcompile.runtime.cuda.executor import CudaExecutor
from dcompile.runtime.cuda.graphs import packed
from dcompile.runtime.cuda.table import Argument, layout
from dcompile.runtime.decode.loop import Runner

Json = dict[str, Any]


def test_structures_lie_as_the_header_says(fake: FakeCuda) -> None:
    offsets = (ctypes.c_size_t * 10).in_dll(fake.c, "fake_offsets")
    node = GraphNode.node.offset
    assert list(offsets) == [
        ctypes.sizeof(KernelNode),
        KernelNode.shared.offset,
        KernelNode.params.offset,
        ctypes.sizeof(CopyNode),
        CopyNode.source.offset + driver.Side.device.offset,
        CopyNode.target.offset + driver.Side.host.offset,
        CopyNode.width.offset,
        ctypes.sizeof(GraphNode),
        node,
        node + driver.Conditional.graphs.offset,
    ]


def test_no_driver(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"no NVIDIA driver[^$]*--target cpu"):
        Driver(str(tmp_path / "libcuda.so.1"))


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("init", 100, "no GPU that it can use"),
        ("init", 999, r"refuses: a fake error \(999\)"),
        ("version", 11080, r"for CUDA 11\.8, which is too old"),
        ("count", 0, "0 GPUs that can be used"),
    ],
)
def test_no_gpu(setting: str, value: int, says: str, fake: FakeCuda) -> None:
    fake.set(setting, value)
    with pytest.raises(DeviceError, match=says):
        fake.device()


def test_loading_an_artifact_without_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gpu_toy.write(tmp_path / "gpu.dcx", Toy())
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        Runner.load(path)


def test_loading_an_artifact_picks_the_gpu(
    tmp_path: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LIBRARY", str(fake.library))
    runner = Runner.load(gpu_toy.write(tmp_path / "gpu.dcx", Toy()))
    assert isinstance(runner.executor, CudaExecutor)


def test_another_gpu_than_compiled_for(tmp_path: Path, fake: FakeCuda) -> None:
    path = gpu_toy.write(tmp_path / "gpu.dcx", Toy(), arch=80)
    with pytest.raises(WrongArchitecture) as raised:
        gpu_toy.runner(path, fake)
    text = str(raised.value)
    assert "kernels for sm_80; this GPU is sm_90 (Fake GPU)" in text
    assert "--target cuda:sm_90" in text and "Triton" in text


def test_another_gpu_with_a_compiler_at_hand(
    tmp_path: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def compile_(artifact: Any, arch: int) -> Any:
        asked.append(arch)
        table, files = gpu_toy.table(gpu_toy.plan(Toy()), arch)
        return table["kernels"], files

    monkeypatch.setattr(code.hooks, "compile", compile_)
    gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", Toy(), arch=80), fake)
    assert asked == [90]


def test_too_little_memory(tmp_path: Path, fake: FakeCuda) -> None:
    path = gpu_toy.write(tmp_path / "gpu.dcx", Toy())
    fake.set_memory(300)
    with pytest.raises(DeviceError, match=r"no memory for state keys_[01][^$]*of 0\.00 GiB"):
        gpu_toy.runner(path, fake)


def test_a_refused_launch_says_which(tmp_path: Path, fake: FakeCuda) -> None:
    executor = gpu_toy.runner(gpu_toy.write(tmp_path / "gpu.dcx", Toy()), fake).executor
    fake.set("refused", 701)
    with pytest.raises(DeviceError, match=r"(?s)refuses.*launch toy_embed"):
        executor.launch(executor.bind(4, 1))


def binary(kernels: Json, name: str) -> Json:
    return kernels["kernels"][name]["binaries"]["sm_90"]


def of_binary(name: str, **values: Any) -> Callable[[Json, Json, Any], None]:
    return lambda text, kernels, files: binary(kernels, name).update(values)


def of_launch(at: int, **values: Any) -> Callable[[Json, Json, Any], None]:
    return lambda text, kernels, files: text["launches"][at].update(values)


def of_argument(at: int, argument: int, value: Any) -> Callable[[Json, Json, Any], None]:
    def change(text: Json, kernels: Json, files: Any) -> None:
        text["launches"][at]["args"][argument] = value

    return change


def of_cubin(name: str, **values: Any) -> Callable[[Json, Json, dict[str, bytes]], None]:
    """Another cubin, of which everything but one fact is as the table says."""

    def change(text: Json, kernels: Json, files: dict[str, bytes]) -> None:
        sizes = [size for _, _, size in binary(kernels, name)["parameters"]]
        asked = {"entry": name, "sizes": sizes, "registers": 40, "static_shared": 16, **values}
        files[binary(kernels, name)["file"]] = make_cubin(
            asked.pop("entry"), asked.pop("sizes"), **asked
        )

    return change


def all_args(at: int, count: int) -> Callable[[Json, Json, Any], None]:
    def change(text: Json, kernels: Json, files: Any) -> None:
        text["launches"][at]["args"] = text["launches"][at]["args"][:count]

    return change


def type_of(name: str, argument: int, **values: Any) -> Callable[[Json, Json, Any], None]:
    return lambda text, kernels, files: kernels["kernels"][name]["arguments"][argument].update(
        values
    )


def drop_kernel(text: Json, kernels: Json, files: Any) -> None:
    del kernels["kernels"]["toy_layer"]


def view(offset: Any) -> Callable[[Json, Json, Any], None]:
    """The first argument of the first launch becomes a part of its buffer."""

    def change(text: Json, kernels: Json, files: Any) -> None:
        place = {"kind": "view", "of": 13, "offset": offset, "strides": [1]}
        buffer = {"name": "v", "dtype": "i64", "shape": [{"R": 1, "": -1}], "place": place}
        text["buffers"].append(buffer)
        text["launches"][0]["args"][0] = {"b": len(text["buffers"]) - 1}

    return change


# Launches of the toy: 0 toy_embed (h0 canvas row_seq row_pos R L), 1 and 2 toy_layer, 3 toy_choose,
# 4 toy_done. Buffers: 0 canvas i64, 13 h0 i64 [R], 15 h2 in the slot of h0, 17 confidence f32.
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (of_binary("toy_layer", registers=41), "says registers 41, its code has 40"),
        (of_binary("toy_layer", stack=8), "says stack 8, its code has 0"),
        (of_binary("toy_layer", static_shared=0), "says static_shared 0, its code has 16"),
        (of_binary("toy_layer", dynamic_shared=232433), "232449 bytes of shared memory, the GPU"),
        (of_binary("toy_layer", scratch=128), "needs scratch memory"),
        (of_binary("toy_layer", warps=33), "no count from 1 to 32"),
        (of_binary("toy_layer", entry="toy_embed"), "says entry toy_embed, its code has toy_layer"),
        (of_binary("toy_layer", parameters=[[0, 0, 8]]), r"says parameters \(\(0, 0, 8\),\)"),
        (of_binary("toy_layer", parameters=7), "table is damaged"),
        (of_binary("toy_layer", file="kernels/sm_90/none.cubin"), "has no file"),
        (of_cubin("toy_layer", registers=48), "says registers 40, its code has 48"),
        (of_cubin("toy_layer", arch=80), "code is for sm_80"),
        (of_cubin("toy_layer", sizes=[8] * 10), "says parameters"),
        (of_cubin("toy_layer", entry="other"), "says entry toy_layer"),
        (lambda t, k, f: f.update({"kernels/sm_90/toy_done.cubin": b"\x7fELF\x02"}), "be read"),
        (lambda t, k, f: f.update({"kernels/sm_90/toy_done.cubin": b"PTX"}), "no 64-bit ELF"),
        (lambda t, k, f: k.pop("kernels"), "table is damaged"),
        (type_of("toy_layer", 6, type="i64"), "its arguments lie at"),
        (type_of("toy_layer", 6, type="fp32"), "argument a6 is of another kind"),
        (type_of("toy_layer", 6, type="i7"), "no type of an argument"),
        (type_of("toy_layer", 6, type="*i64"), "its arguments lie at"),
        (type_of("toy_layer", 0, type="*fp32"), "argument a0 is i64, not fp32"),
        (type_of("toy_embed", 4, aligned=True), "argument a4 is no multiple of 16"),
        (drop_kernel, "kernel 'toy_layer', which the artifact lacks"),
        (all_args(1, 7), "7 arguments, its kernel takes 8"),
        (of_argument(0, 0, {"i": 3}), "argument a0 is of another kind"),
        (of_argument(0, 4, {"b": 13}), "argument a4 is of another kind"),
        (of_argument(0, 4, {"f": 1.0}), "argument a4 is of another kind"),
        (of_argument(0, 4, {"i": {"R": 1 << 31}}), "argument a4 is 2147483648 at R=1"),
        (of_argument(0, 0, {"b": 17}), "argument a0 is fp32, not i64"),
        (of_argument(0, 0, {"b": None}), "argument is null"),
        (of_argument(1, 1, {"b": 15}), "reads h2, which is overwritten or not computed"),
        (of_argument(2, 0, {"b": 14}), "writes h2, which is not among its arguments"),
        (view(1), "argument a0 does not start at 16 bytes"),
        (of_launch(0, grid=[1, 65536, 1]), "a grid of"),
        (of_launch(0, grid=[{"R": -1}, 1, 1]), "a grid of"),
        (of_launch(0, grid=[1, 1]), "is no grid"),
        (of_launch(0, grid=[{"cdiv": [{"R": 1}, 0]}, 1, 1]), "divides by no positive number"),
        (of_launch(0, grid=[{"pow": [2, 3]}, 1, 1]), "is no size"),
        (of_launch(0, where="native"), "of cuda launches has others in it"),
        (lambda t, k, f: t["loop"]["args"].pop(), "9 arguments, its kernel takes 10"),
        (lambda t, k, f: t["loop"]["args"][3].update(loop="clock"), "memory that no loop has"),
        (lambda t, k, f: t["loop"]["args"].reverse(), "another kind|is i32"),
    ],
)
def test_what_is_damaged_is_refused(change: Any, says: str, tmp_path: Path, fake: FakeCuda) -> None:
    path = gpu_toy.write(tmp_path / "gpu.dcx", Toy(), change)
    with pytest.raises(ArtifactError, match=says):
        CudaExecutor(open_artifact(path), fake.device())


def test_even_offsets_of_aligned_arguments_pass(tmp_path: Path, fake: FakeCuda) -> None:
    path = gpu_toy.write(tmp_path / "gpu.dcx", Toy(), view(2))
    with pytest.raises(ArtifactError, match="ends outside h0"):
        open_artifact(path)  # of a single row, nothing is left


def test_a_cpu_plan_on_the_gpu(tmp_path: Path) -> None:
    def native(text: Json, kernels: Json, files: Any) -> None:
        for launch in text["launches"]:
            launch["where"] = "native"
        text["regions"][0]["kind"] = "native"

    path = gpu_toy.write(tmp_path / "gpu.dcx", Toy(), native)
    with pytest.raises(ArtifactError, match="does not run on the target, cuda"):
        open_artifact(path)


@given(st.data())
def test_a_damaged_cubin_never_surprises(data: st.DataObject) -> None:
    blob = bytearray(make_cubin("kernel", [8, 8, 4, 8, 8], registers=77, stack=16))
    facts = read_cubin(bytes(blob))
    assert (facts.registers, facts.stack, facts.arch) == (77, 16, 90)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.integers(0, len(blob)))]
    with contextlib.suppress(ValueError):
        read_cubin(bytes(blob))


TYPES = {"*bf16": "<Q", "i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"}


@given(st.lists(st.sampled_from([*TYPES]), max_size=12), st.randoms())
def test_arguments_lie_where_a_c_compiler_puts_them(types: list[str], draw: Any) -> None:
    arguments = [Argument(f"a{i}", type_, False) for i, type_ in enumerate(types)]
    values = [
        struct.pack(TYPES[t], draw.getrandbits(30) if t[0] in "*i" else draw.random())
        for t in types
    ]
    kinds = {"Q": ctypes.c_uint64, "i": ctypes.c_int32, "q": ctypes.c_int64}
    kinds |= {"f": ctypes.c_float, "d": ctypes.c_double}
    fields = [(f"a{i}", kinds[TYPES[t][1]]) for i, t in enumerate(types)]

    class Struct(ctypes.Structure):
        _fields_ = [*fields, ("scratch", ctypes.c_uint64), ("profile", ctypes.c_uint64)]

    places = layout(arguments)
    found = [getattr(Struct, name) for name, _ in Struct._fields_]
    wanted = [(i, field.offset, field.size) for i, field in enumerate(found)]
    assert list(places) == wanted
    pointers, block = packed([*values, bytes(8), bytes(8)], places)
    for (ordinal, _, size), value in zip(places, [*values, bytes(8), bytes(8)], strict=True):
        assert ctypes.string_at(pointers[ordinal], size) == value
    assert all(
        ctypes.addressof(block) <= p < ctypes.addressof(block) + len(block) for p in pointers
    )
