"""Reading: what is refused, and that damage is either found or harmless."""

from __future__ import annotations

import json
import platform
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import Toy

from dcompile.errors import ArtifactError
from dcompile.runtime import artifact as reading
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.writing import seal


@pytest.fixture(params=["toy.dcx", "toy"])
def path(request: pytest.FixtureRequest, tmp_path: Path, code: bytes) -> Path:
    return toy.write(tmp_path / request.param, Toy(), code)


def contents(artifact: Artifact) -> dict[str, Any]:
    return {
        "manifest": artifact.manifest,
        "files": {name: bytes(artifact.bytes(name)) for name in artifact.names},
        "tensors": {name: artifact.weights(name).tolist() for name in artifact.tensors},
    }


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter a manifest as somebody would who knows how it is sealed."""
    file = folder / "manifest.json"
    body = json.loads(file.read_text())
    change(body)
    body["sha256"] = seal(body)
    file.write_text(json.dumps(body))


def refused(path: Path, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        open_artifact(path)


def test_reads_what_was_written(path: Path) -> None:
    artifact = open_artifact(path)
    assert artifact.text("report.txt") == "a report\n"
    assert artifact.manifest["model"]["family"] == "toy"
    assert artifact.isa == "any" and artifact.kernel_files == ("kernels/any.so",)
    assert artifact.weights("weight").tolist() == [1, 2, 3]
    assert artifact.weights("odd").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ArtifactError, match="no file"):
        artifact.text("nothing")


def test_both_forms_are_equal(tmp_path: Path, code: bytes) -> None:
    forms = [toy.write(tmp_path / name, Toy(), code) for name in ("a", "a.dcx")]
    assert contents(open_artifact(forms[0])) == contents(open_artifact(forms[1]))


def test_the_same_artifact_has_the_same_bytes(tmp_path: Path, code: bytes) -> None:
    forms = [toy.write(tmp_path / name, Toy(), code) for name in ("a.dcx", "b.dcx")]
    assert forms[0].read_bytes() == forms[1].read_bytes()


def test_runs_after_it_was_moved_and_removed(path: Path, code: bytes) -> None:
    moved = path.rename(path.with_name("moved" + path.suffix))
    runner = Runner.load(moved)
    shutil.rmtree(moved) if moved.is_dir() else moved.unlink()
    assert runner.generate([[1]], gen_length=4)[0].all_tokens == toy.decode(Toy(), [1], 4)[0]
    assert runner.artifact.weights("weight").tolist() == [1, 2, 3]


def test_unknown_fields_are_kept(tmp_path: Path, code: bytes) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    reseal(folder, lambda body: body.update(later={"x": 1}))
    assert open_artifact(folder).manifest["later"] == {"x": 1}


@pytest.mark.parametrize("name", ["missing", "empty", "text.dcx", "zero.dcx", "zip.dcx", "other"])
def test_refuses_what_is_no_artifact(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    if name == "text.dcx":
        path.write_text("hello")
    if name == "zero.dcx":
        path.write_bytes(b"")
    if name == "zip.dcx":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("hello.txt", "hello")
    if name == "other":
        path.mkdir()
        (path / "manifest.json").write_text('{"name": "a web page", "files": {}}')
    refused(path, "artifact")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 3}, "format 3, this dcompile reads 1 to 2"),
        ({"format": 0}, "format 0"),
        ({"format": True}, "format True"),
        ({"target": "cuda:sm_90"}, "cuda:sm_90"),
        ({"machine": "riscv64"}, "riscv64"),
        ({"model": None}, "no 'model'"),
        ({"files": []}, "no 'files'"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "outside the artifact"),
        ({"files": {"report.txt": 3}}, "outside the artifact"),
        ({"kernels": {"isas": {}}}, "there is none"),
        ({"kernels": {"isas": {"z": {"requires": ["amx9"], "files": []}}}}, "z needs amx9"),
        ({"kernels": {"isas": {"z": {"requires": [], "files": ["k.so"]}}}}, "not there: k.so"),
        ({"kernels": {"isas": {"z": {"requires": 3}}}}, "cannot be read"),
        ({"kernels": {}}, "cannot be read"),
    ],
)
def test_refuses_a_manifest(
    change: dict[str, Any], words: str, tmp_path: Path, code: bytes
) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    reseal(folder, lambda body: body.update(change))
    refused(folder, words)


def test_refuses_an_altered_manifest(tmp_path: Path, code: bytes) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"threshold": 0.9', '"threshold": 0.8'))
    refused(folder, "damaged or was altered")


@pytest.mark.parametrize("text", ["", "[", "[1]", "\xff", "[" * 100_000, '{"format": 1}'])
def test_refuses_a_manifest_that_is_no_json(text: str, tmp_path: Path, code: bytes) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    refused(folder, "manifest")


def test_takes_the_first_variant_that_runs(
    tmp_path: Path, code: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    isas = {
        "amx": {"requires": ["amx_bf16", "avx512f"], "files": []},
        "avx512": {"requires": ["avx512f"], "files": []},
        "avx2": {"requires": ["avx2"], "files": []},
    }
    reseal(folder, lambda body: body.update(kernels={"isas": isas}))
    for flags, isa in [("avx2 avx512f", "avx512"), ("avx2", "avx2")]:
        monkeypatch.setattr(reading, "cpu_flags", lambda flags=flags: frozenset(flags.split()))
        assert open_artifact(folder).isa == isa
    monkeypatch.setattr(reading, "cpu_flags", lambda: frozenset[str]())
    refused(folder, "avx2 needs avx2")


def test_finds_a_changed_file(tmp_path: Path, code: bytes) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    report = folder / "report.txt"
    report.write_text("A report\n")
    refused(folder, "its hash differs")
    open_artifact(folder, verify=False)
    report.write_text("longer than a report\n")
    refused(folder, "21 bytes, the manifest says 9")
    report.unlink()
    refused(folder, "missing")


def test_refuses_links(tmp_path: Path, code: bytes) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    elsewhere = tmp_path / "elsewhere"
    (folder / "weights").rename(elsewhere)
    (folder / "weights").symlink_to(elsewhere)
    refused(folder, "contains a link")
    # The artifact itself may be named by one.
    whole = toy.write(tmp_path / "b", Toy(), code)
    (tmp_path / "link").symlink_to(whole)
    open_artifact(tmp_path / "link")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "C:\\evil", "a\\..\\b"])
def test_refuses_names_that_leave(name: str, tmp_path: Path, code: bytes) -> None:
    path = toy.write(tmp_path / "a.dcx", Toy(), code)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, "x")
    refused(path, "leaves the archive")


def test_refuses_compressed_entries(tmp_path: Path, code: bytes) -> None:
    path = toy.write(tmp_path / "a.dcx", Toy(), code)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb", bytes(1 << 20))
    refused(path, "'bomb' is compressed")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_truncation_is_found(data: st.DataObject, tmp_path: Path, code: bytes) -> None:
    path = tmp_path / "a.dcx"
    whole = (path if path.exists() else toy.write(path, Toy(), code)).read_bytes()
    cut = tmp_path / "cut.dcx"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ArtifactError):
        open_artifact(cut)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_flipped_bit_is_found_or_harmless(
    data: st.DataObject, tmp_path: Path, code: bytes
) -> None:
    path = tmp_path / "a.dcx"
    whole = (path if path.exists() else toy.write(path, Toy(), code)).read_bytes()
    with zipfile.ZipFile(path) as file:
        begin = file.start_dir
    # Half of them in the directory, which no hash covers.
    at = data.draw(st.integers(0, begin - 1) | st.integers(begin, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    other = tmp_path / "damaged.dcx"
    other.write_bytes(damaged)
    try:
        artifact = open_artifact(other)
    except ArtifactError:
        return
    assert contents(artifact) == contents(open_artifact(path))


def test_weights_are_mapped_in_place(path: Path) -> None:
    artifact = open_artifact(path)
    assert all(artifact.weights(name).ctypes.data % 64 == 0 for name in artifact.tensors)
    assert artifact.weights("weight").ctypes.data == artifact.weights("weight").ctypes.data
    maps = Path("/proc/self/maps").read_text().splitlines()
    address = artifact.weights("weight").ctypes.data
    (line,) = [
        line
        for line in maps
        if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
    ]
    assert str(path.name) in line and "r--" in line


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b'{"weight": 3}',
        b'{"weight": {"dtype": "F9", "shape": [3], "data_offsets": [0, 12]}}',
        b'{"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}',
        b'{"weight": {"dtype": "F32", "shape": [-3], "data_offsets": [0, -12]}}',
        b'{"weight": {"dtype": "F32", "shape": [3], "data_offsets": [-12, 0]}}',
        b'{"weight": {"dtype": "F32", "shape": [9000], "data_offsets": [0, 36000]}}',
        b'{"weight": {"dtype": "F32", "shape": "3", "data_offsets": [0, 12]}}',
    ],
)
def test_refuses_weights(header: bytes, tmp_path: Path, code: bytes) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    data = len(header).to_bytes(8, "little") + header + bytes(64)
    rewrite(folder, "weights/00000.safetensors", data)
    refused(folder, "weight|tensor")


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and everything that vouches for it."""
    import hashlib

    (folder / name).write_bytes(data)
    claim = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    reseal(folder, lambda body: body["files"].update({name: claim}))


def test_refuses_a_weight_smaller_than_its_buffer(tmp_path: Path, code: bytes) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    plan = toy.plan(Toy())
    plan["buffers"][-1]["shape"] = [4]
    rewrite(folder, "plan.json", json.dumps(plan).encode())
    refused(folder, "has 12 bytes, the plan needs 16")
    plan["buffers"][-1]["place"]["tensor"] = "gone"
    rewrite(folder, "plan.json", json.dumps(plan).encode())
    refused(folder, "'gone', which no weight file has")


@pytest.mark.parametrize(
    ("kernel", "words"), [("toy_gone", "lacks"), ("aten.gone.x", "no operator")]
)
def test_refuses_a_plan_whose_code_is_not_there(
    kernel: str, words: str, tmp_path: Path, code: bytes
) -> None:
    folder = toy.write(tmp_path / "a", Toy(), code)
    plan = toy.plan(Toy())
    plan["launches"][4 if kernel.startswith("aten") else 0]["kernel"] = kernel
    rewrite(folder, "plan.json", json.dumps(plan).encode())
    with pytest.raises(ArtifactError, match=words):
        Runner.load(folder)


def test_refuses_code_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = toy.write(tmp_path / "a.dcx", Toy(), b"\x7fELF, but no more than that")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        Runner.load(path)


def test_all_dtypes_come_back(tmp_path: Path, code: bytes) -> None:
    from dcompile.runtime.artifact import write_artifact
    from dcompile.runtime.tensors import TORCH, arrays_of, tensor_of

    tensors = {name: torch.arange(5).to(dtype) for name, dtype in TORCH.items()}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "weight": torch.ones(3)}
    tensors["strided"] = torch.arange(12.0).reshape(3, 4).T
    path = tmp_path / "a"
    files = {"kernels/any.so": code}
    arrays = arrays_of(tensors.items())
    write_artifact(path, toy.manifest(Toy()), toy.plan(Toy()), arrays, files)
    artifact = open_artifact(path)
    held = {name: tensor_of(artifact.weights(name)) for name in tensors}
    assert all(held[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    from safetensors.torch import load_file

    (file,) = (path / "weights").iterdir()
    found = {name: t for name, t in load_file(file).items() if not name.startswith(".pad.")}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its code is for x86-64")
@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "released").iterdir()))
def test_artifacts_of_every_released_format_run(path: Path) -> None:
    """Each is as its version wrote it; a format that is read once is read for ever."""
    runner = Runner.load(path)
    assert path.name == f"format_{runner.artifact.manifest['format']}"
    assert runner.generate([[1]], gen_length=4)[0].all_tokens == toy.decode(Toy(), [1], 4)[0]
