"""Weights outside of the artifact: bound by hash, found again, shared between processes."""

from __future__ import annotations

import re
import shutil
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

from dcompile.errors import ArtifactError
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.writing import ArtifactWriter


def write(path: Path, code: bytes, size: int = 3) -> Path:
    """The toy's artifact at `path` with its weights outside; the folder of the weights."""
    before = set(path.parent.iterdir())
    whole = toy.write(path.parent / "inside.dcx", Toy(), code)
    artifact = open_artifact(whole)
    with ArtifactWriter(path, external=True) as writer:
        for name in artifact.names:
            if not name.startswith("weights/"):
                writer.add_bytes(name, artifact.bytes(name))
        tensors = {name: artifact.weights(name) for name in artifact.tensors}
        writer.add_weights((tensors | {"large": np.ones(size, np.float32)}).items())
        owned = ("format", "files", "sha256")
        writer.finish({k: v for k, v in artifact.manifest.items() if k not in owned})
    whole.unlink()
    (folder,) = {p for p in path.parent.iterdir() if p.is_dir()} - before - {path}
    return folder


@pytest.fixture(params=["toy.dcx", "toy"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def test_runs_with_the_weights_outside(path: Path, code: bytes) -> None:
    folder = write(path, code)
    assert folder.name.startswith("toy.weights-")
    artifact = open_artifact(path)
    assert artifact.weights("weight").tolist() == [1, 2, 3]
    assert not any(name.startswith("weights/") for name in artifact.names)
    result = Runner.load(path).generate([[1]], gen_length=4)[0]
    assert result.all_tokens == toy.decode(Toy(), [1], 4)[0]


def test_moved_weights_are_asked_for_and_found(path: Path, code: bytes, tmp_path: Path) -> None:
    folder = write(path, code)
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"are not there[^!]*--weights FOLDER"):
        open_artifact(path)
    assert open_artifact(path, weights_at=moved).weights("weight").tolist() == [1, 2, 3]
    with pytest.raises(ArtifactError, match="missing"):
        open_artifact(path, weights_at=tmp_path)


def test_changed_weights_are_refused(path: Path, code: bytes) -> None:
    folder = write(path, code)
    (file,) = folder.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-60] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="its hash differs"):
        open_artifact(path)
    open_artifact(path, verify=False)
    file.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="the manifest says"):
        open_artifact(path, verify=False)
    shutil.rmtree(file.parent)
    file.parent.symlink_to("/tmp")
    with pytest.raises(ArtifactError, match="a link"):
        open_artifact(path)


def test_another_models_weights_are_refused(code: bytes, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write(tmp_path / "a" / "toy.dcx", code)
    other = write(tmp_path / "b" / "toy.dcx", code, size=64)
    with pytest.raises(ArtifactError, match="bytes"):
        open_artifact(tmp_path / "a" / "toy.dcx", weights_at=other)
    inside = toy.write(tmp_path / "inside.dcx", Toy(), code)
    with pytest.raises(ArtifactError, match="holds its own weights"):
        open_artifact(inside, weights_at=other)


def test_equal_weights_share_a_folder_and_nothing_is_left(path: Path, code: bytes) -> None:
    folder = write(path, code)
    shutil.move(folder, folder.with_name("aside"))
    assert write(path, code).name == folder.name
    shutil.rmtree(folder.with_name("aside"))
    assert {p.name for p in path.parent.iterdir()} == {path.name, folder.name}


def test_a_broken_write_leaves_the_old(path: Path, code: bytes) -> None:
    folder = write(path, code)

    def failing() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        yield "weight", np.zeros(3, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ArtifactWriter(path, external=True) as writer:
        writer.add_weights(failing())
    assert {p.name for p in path.parent.iterdir()} == {path.name, folder.name}
    assert open_artifact(path).weights("weight").tolist() == [1, 2, 3]


READER = """
import sys
from dcompile.runtime.artifact import open_artifact
tensor = open_artifact(sys.argv[1]).weights("large")
print(float(tensor.sum()), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("external", [False, True])
def test_processes_share_one_mapped_copy(external: bool, code: bytes, tmp_path: Path) -> None:
    """Two processes that read all of 16 MiB: each counts half of it, and none has pages of its own."""
    path = tmp_path / "toy.dcx"
    write(path, code, 4 << 20)
    if not external:
        artifact = open_artifact(path)
        tensors = {name: artifact.weights(name) for name in artifact.tensors}
        files = {n: bytes(artifact.bytes(n)) for n in artifact.names}
        owned = ("format", "files", "sha256", "external")
        manifest = {k: v for k, v in artifact.manifest.items() if k not in owned}
        path = tmp_path / "whole.dcx"
        with ArtifactWriter(path) as writer:
            for name, data in files.items():
                writer.add_bytes(name, data)
            writer.add_weights(tensors.items())
            writer.finish(manifest)
    command = [sys.executable, "-c", READER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    readers = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    try:
        assert [float(r.stdout.readline()) for r in readers] == [float(4 << 20)] * 2
        for reader in readers:
            mapped = mappings(reader.pid, tmp_path)
            assert mapped["Rss"] >= 16 << 20
            assert mapped["Private_Dirty"] == 0 and mapped["Pss"] <= mapped["Rss"] * 0.6
    finally:
        for reader in readers:
            reader.communicate("\n", timeout=60)


def mappings(process: int, folder: Path) -> dict[str, int]:
    """Bytes of the process's mappings of files in a folder, by the kernel's names."""
    total = {"Rss": 0, "Pss": 0, "Private_Dirty": 0}
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
            assert not inside or " r--" in line
        name, _, rest = line.partition(":")
        if inside and name in total:
            total[name] += int(rest.split()[0]) << 10
    return total
