"""`dcompile info`: what a model is, as a table and as JSON, without loading torch for an artifact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import toy
from checkpoints import write_checkpoint
from commands import call, fails
from toy import Toy

from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options
from dcompile.runtime.writing import seal


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("described") / "checkpoint", "llada_moe")


@pytest.fixture(scope="module")
def compiled(checkpoint: Path) -> Path:
    options = Options(max_length=64, block_length=8, batch=2, cache="dual", weights="external")
    return compile_checkpoint(checkpoint, options, checkpoint.parent / "model.dcx")


def facts(capsys: pytest.CaptureFixture[str], path: Path | str) -> dict[str, Any]:
    assert call("info", str(path), "--json") == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def test_an_artifact(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, compiled)
    model, sizes = found["model"], found["bytes"]
    assert (model["family"], model["dtype"], model["layers"]) == ("llada_moe", "float32", 2)
    assert (found["block_length"], found["max_length"], found["batch"]) == (8, 64, 2)
    assert found["cache"] == {"name": "dual", "exact": False}
    assert found["policy"]["parameters"].keys() == {"threshold"}
    assert found["tokenizer"] and found["chat_template"]
    assert found["options"]["block_length"] == 8
    folder = compiled.parent / str(found["weights_folder"])
    outside = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    assert sizes["weights"] == outside > 0
    with zipfile.ZipFile(compiled) as archive:
        inside = {m.filename: m.file_size for m in archive.infolist()}
    code = {isa: inside[f"kernels/{isa}/library.so"] for isa in sizes["code"]}
    assert all(0 < code[isa] <= size for isa, size in sizes["code"].items())
    assert sizes["all"] == outside + sum(inside.values()) - inside["manifest.json"]
    assert found["runs_here"] in sizes["code"]


def test_the_same_in_words(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("info", str(compiled)) == 0
    rows = {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
    assert rows["cache"] == "dual, approximate" and rows["decoding"] == "blockwise, blocks of 8"
    assert rows["policy"].startswith("threshold: threshold 0.")
    assert "2 sequences" in rows["room"] and "batch 2" in rows["options"]
    assert rows["text"] == "tokenizer, chat template"


def test_a_folder_and_an_exact_cache(
    tmp_path: Path, code: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy.write(tmp_path / "folder", Toy(), code)
    found = facts(capsys, path)
    assert found["kind"] == "artifact" and found["cache"] == {"name": "none", "exact": True}
    assert (found["tokenizer"], found["chat_template"]) == (False, False)
    assert call("info", str(path)) == 0
    assert "no tokenizer, no chat template" in capsys.readouterr().out


def test_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, checkpoint)
    assert found["kind"] == "checkpoint" and found["tokenizer"] and found["chat_template"]
    model, sizes = found["model"], found["bytes"]
    files = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    assert 0 < sizes["weights"] <= files and 4 * model["parameters"] == sizes["weights"]
    assert call("info", str(checkpoint)) == 0
    assert "unless compiled otherwise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "word"), [("no.dcx", "ArtifactError"), ("no", "CheckpointError"), (".", "Checkpoint")]
)
def test_nothing_to_describe(
    name: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(capsys, 1, "info", str(tmp_path / name)).startswith(word)


def test_an_exported_program_says_too_little(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.pt2").write_bytes(b"")
    assert "--mask-id" in fails(capsys, 1, "info", str(tmp_path / "m.pt2"))


@pytest.mark.parametrize("key", ["model", "policy", "options", "kernels", "files", "external"])
@pytest.mark.parametrize("value", [None, 3, [], {}, "text", {"a": 1}])
def test_a_manifest_of_other_kinds(
    key: str, value: object, tmp_path: Path, code: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy.write(tmp_path / "folder", Toy(), code)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[key] = value
    manifest["sha256"] = seal(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    for more in ([], ["--json"]):
        code_of = call("info", str(path), *more)
        assert code_of in (0, 1) and "Traceback" not in capsys.readouterr().err


def test_no_torch_for_an_artifact(compiled: Path) -> None:
    text = (
        "import sys\nfrom dcompile.cli import main\n"
        "try:\n    main(['info', sys.argv[1]])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", text, str(compiled)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("artifact ")
