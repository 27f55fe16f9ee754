"""Writing: whatever interrupts it, nothing half-made is left, and what was there before stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import toy
from toy import Toy

from dcompile.errors import OutputError
from dcompile.runtime import weights, writing
from dcompile.runtime.artifact import ArtifactWriter, open_artifact, write_artifact
from dcompile.runtime.sidecar import temporary

FORMS = pytest.mark.parametrize("name", ["out.dcx", "out"])


def write(path: Path, tensors: Iterator[tuple[str, npt.NDArray[Any]]], code: bytes) -> None:
    files = {"kernels/any.so": code}
    write_artifact(path, toy.manifest(Toy()), toy.plan(Toy()), tensors, files)


@FORMS
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit, MemoryError])
def test_an_interrupted_write_leaves_nothing(
    error: type[BaseException], name: str, tmp_path: Path, code: bytes
) -> None:
    def tensors() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        yield "weight", np.ones(3, np.float32)
        raise error

    with pytest.raises(error):
        write(tmp_path / name, tensors(), code)
    assert list(tmp_path.iterdir()) == []


@FORMS
def test_an_interrupted_write_leaves_the_old_one(name: str, tmp_path: Path, code: bytes) -> None:
    def tensors() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        yield "weight", np.ones(3, np.float32)
        raise KeyboardInterrupt

    toy.write(tmp_path / name, Toy(), code)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / name, tensors(), code)
    assert os.listdir(tmp_path) == [name]
    assert open_artifact(tmp_path / name).weights("weight").tolist() == [1, 2, 3]
    write(tmp_path / name, iter([("weight", np.zeros(3, np.float32))]), code)
    assert os.listdir(tmp_path) == [name]
    assert open_artifact(tmp_path / name).weights("weight").tolist() == [0, 0, 0]


def test_a_failed_exchange_puts_the_old_folder_back(
    tmp_path: Path, code: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the system cannot let two names trade, there are two renames.
    monkeypatch.setattr(writing, "exchange", lambda a, b: False)
    path = toy.write(tmp_path / "out", Toy(), code)
    rename = os.rename

    def fail_once_moved(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise PermissionError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once_moved)
    with pytest.raises(OutputError):
        write(path, iter([("weight", np.zeros(3, np.float32))]), code)
    assert os.listdir(tmp_path) == ["out"]
    assert open_artifact(path).weights("weight").tolist() == [1, 2, 3]


@FORMS
def test_what_a_killed_writer_left_goes_with_the_next(
    name: str, tmp_path: Path, code: bytes
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for owner in (ended.pid, os.getpid()):
        left = temporary(tmp_path / name)
        left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{owner}-"))
        left.mkdir() if name == "out" else left.write_bytes(b"half")
    other = tmp_path / f".{name}.artifact.elsewhere-{ended.pid}-0.tmp"
    other.touch()
    toy.write(tmp_path / name, Toy(), code)
    found = os.listdir(tmp_path)
    assert len(found) == 3 and name in found and other.name in found
    assert not any(f"-{ended.pid}-" in entry for entry in found if entry != other.name)


@FORMS
def test_leaving_without_finish_leaves_nothing(name: str, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / name) as writer:
        writer.add_bytes("a", b"x")
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import resource, signal, sys, time
sys.path.insert(0, {tests!r})
import numpy as np, toy
from dcompile.errors import OutputError
from dcompile.runtime.artifact import write_artifact
def tensors():
    yield "weight", np.zeros(3, np.float32)
    for i in range({count}):
        yield f"big.{{i}}", np.zeros(40_000, np.float32)
        print(i, flush=True)
        time.sleep({pause})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
import dcompile.runtime.weights as w
w.SHARD_BYTES = 100_000
try:
    write_artifact({path!r}, toy.manifest(toy.Toy()), toy.plan(toy.Toy()), tensors(),
                   {{"kernels/any.so": open({code!r}, "rb").read()}})
except OutputError as error:
    print(error)
    sys.exit(3)
"""


def script(path: Path, code: bytes, *, count: int, pause: float, limit: int) -> list[str]:
    library = path.parent.parent / "toy.so"
    library.write_bytes(code)
    tests = str(Path(toy.__file__).parent)
    text = SCRIPT.format(
        tests=tests, path=str(path), code=str(library), count=count, pause=pause, limit=limit
    )
    return [sys.executable, "-c", text]


@FORMS
def test_a_full_disk_is_a_named_error(name: str, tmp_path: Path, code: bytes) -> None:
    folder = tmp_path / "to"
    folder.mkdir()
    path = toy.write(folder / name, Toy(), code)
    # A limit on a file's size fails a write as a full disk does, in the middle of a shard.
    command = script(path, code, count=4, pause=0, limit=100_000)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert "could not be written" in done.stdout and "free some space" in done.stdout
    assert os.listdir(folder) == [name]
    open_artifact(path)


@FORMS
def test_a_killed_write_leaves_the_old_one(name: str, tmp_path: Path, code: bytes) -> None:
    folder = tmp_path / "to"
    folder.mkdir()
    path = toy.write(folder / name, Toy(), code)
    command = script(path, code, count=1000, pause=0.01, limit=0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "5":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert open_artifact(path).weights("weight").tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("made", "name", "words"),
    [
        ("", "no/such/out.dcx", "no folder"),
        ("out.dcx/", "out.dcx", "no regular file"),
        ("out", "out", "cannot replace a file"),
        ("photos/cat.jpg", "photos", "not an artifact"),
    ],
)
def test_refuses_a_place(made: str, name: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / made
    if made.endswith("/"):
        path.mkdir()
    elif made:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    with pytest.raises(OutputError, match=words):
        ArtifactWriter(tmp_path / name)
    assert not made or path.exists()


def test_a_device_is_not_replaced() -> None:
    # Named as a folder, since it does not end in .dcx.
    with pytest.raises(OutputError):
        ArtifactWriter("/dev/full")


def test_an_empty_folder_is_taken(tmp_path: Path, code: bytes) -> None:
    (tmp_path / "out").mkdir()
    open_artifact(toy.write(tmp_path / "out", Toy(), code))


@pytest.mark.parametrize("name", ["../x", "/x", "", "a//b", "manifest.json", "a\\b"])
def test_names_stay_inside(name: str, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer, pytest.raises(ValueError):
        writer.add_bytes(name, b"")


def test_tensors_are_streamed(tmp_path: Path, code: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards close when they are full, and a large tensor is gone before the next is asked for."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 1000)
    alive = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    most = 0

    def tensors() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        nonlocal alive, most
        yield "weight", np.ones(3, np.float32)
        for index in range(6):
            alive += 1
            most = max(most, alive)
            yield f"big.{index}", np.full(400, float(index), np.float32).view(Counted)
        yield "small", np.ones(2, np.float32)

    write(tmp_path / "out", tensors(), code)
    artifact = open_artifact(tmp_path / "out")
    assert most == 1
    assert len(list((tmp_path / "out/weights").iterdir())) == 8
    assert np.unique(artifact.weights("big.5")).tolist() == [5]


def test_a_name_is_there_once(tmp_path: Path, code: bytes) -> None:
    tensors = [("weight", np.ones(3, np.float32)), ("weight", np.ones(5, np.float32))]
    with pytest.raises(ValueError, match="twice"):
        write(tmp_path / "out", iter(tensors), code)
