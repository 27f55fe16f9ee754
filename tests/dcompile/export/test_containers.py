"""An artifact as folder and as file: there and back again, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dcompile.errors import ArtifactError, OptionError, OutputError
from dcompile.export.command import Asked, export
from dcompile.export.containers import repack
from dcompile.runtime.archive import MANIFEST
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.writing import seal


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_there_and_back_gives_the_same_bytes(make: Any, tmp_path: Path) -> None:
    made = make("llada_moe")
    folder = repack(made.artifact, tmp_path / "folder", "folder")
    file = repack(folder, tmp_path / "again.dcx", "dcx")
    assert file.read_bytes() == made.artifact.read_bytes()
    assert files(repack(file, tmp_path / "third", "folder")) == files(folder)
    prompts = [[1, 2, 3], [5] * 9]
    a, b = (Runner.load(path).generate(prompts, gen_length=16) for path in (folder, file))
    assert [r.all_tokens for r in a] == [r.all_tokens for r in b]


def test_fields_that_nobody_knows_are_kept(make: Any, tmp_path: Path) -> None:
    made = make("llada_moe")
    folder = repack(made.artifact, tmp_path / "folder", "folder")
    body = json.loads((folder / MANIFEST).read_text()) | {"later": {"format": [1, 2]}}
    body["sha256"] = seal(body)
    (folder / MANIFEST).write_text(json.dumps(body))
    file = repack(folder, tmp_path / "m.dcx", "dcx")
    back = repack(file, tmp_path / "back", "folder")
    assert (back / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


@pytest.mark.parametrize("damage", ["flip", "remove", "manifest", "name"])
def test_a_damaged_artifact_is_not_copied(make: Any, tmp_path: Path, damage: str) -> None:
    made = make("llada_moe")
    folder = repack(made.artifact, tmp_path / "folder", "folder")
    plan = folder / "plan.json"
    if damage == "flip":
        plan.write_bytes(plan.read_bytes().replace(b"layers.0", b"layers.7", 1))
    elif damage == "remove":
        plan.unlink()
    else:
        body = json.loads((folder / MANIFEST).read_text())
        if damage == "name":
            body["files"]["../out"] = body["files"].pop("plan.json")
            body["sha256"] = seal(body)
        else:
            body["target"] = "gpu"
        (folder / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(ArtifactError):
        repack(folder, tmp_path / "m.dcx", "dcx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


def test_errors_have_names(make: Any, tmp_path: Path) -> None:
    made = make("llada_moe")
    artifact, checkpoint = made.artifact, made.folder

    def ask(source: Path, out: Path, format: str) -> Path:
        return export(Asked(source, out, format)).files[0]

    with pytest.raises(OptionError, match=r"no export format 'tflite'(.|\n)*folder"):
        ask(artifact, tmp_path / "x", "tflite")
    with pytest.raises(OptionError, match="is a checkpoint"):
        ask(checkpoint, tmp_path / "x", "folder")
    with pytest.raises(OutputError, match="not named"):
        ask(artifact, tmp_path / "x.dcx", "folder")
    with pytest.raises(OutputError, match="no folder to write to"):
        ask(artifact, tmp_path / "none" / "x.dcx", "dcx")
    taken = tmp_path / "taken"
    shutil.copytree(checkpoint, taken)
    with pytest.raises(OutputError, match="not an artifact"):
        ask(artifact, taken, "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]
