"""Artifacts for CUDA, compiled without a GPU: every family and the shipped model, behind the gate."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, write_checkpoint

from dcompile.demo import MODEL
from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import BuildError, DcompileError, OptionError
from dcompile.explain.command import explain
from dcompile.options import Options
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.decode.loop import Runner

LAUNCHES_A_LAYER = 10


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """bfloat16, as served; kernels of equal shape are compiled once for all."""
    found = {}
    for family in FAMILIES:
        root = tmp_path_factory.mktemp(family)
        folder = write_checkpoint(root / "checkpoint", family, dtype=torch.bfloat16)
        found[family] = _compile(folder, root)
    found["shipped"] = _compile(MODEL, tmp_path_factory.mktemp("shipped"))
    return found


def _compile(checkpoint: Path, root: Path) -> Path:
    options = Options(target="cuda:sm_90", max_length=128, batch=2)
    return compile_checkpoint(checkpoint, options, root / "model.dcx")


def _kernels(artifact: Artifact) -> dict[str, dict[str, object]]:
    return json.loads(artifact.text("kernels.json"))["kernels"]


@pytest.mark.parametrize("name", [*FAMILIES, "shipped"])
def test_ten_launches_a_layer_and_nothing_spilled(artifacts: dict[str, Path], name: str) -> None:
    artifact = open_artifact(artifacts[name])
    launches = artifact.plan.text["launches"]
    assert {item["where"] for item in launches} == {"cuda"}
    assert [r["kind"] for r in artifact.plan.text["regions"]] == ["cuda"]
    layers = Counter(item["layer"] for item in launches)
    assert layers.pop(None) <= 6  # embedding, last norm, candidates, choice in two, commit
    assert layers and max(layers.values()) <= LAUNCHES_A_LAYER
    kernels = _kernels(artifact)
    assert {item["kernel"] for item in launches} | {"advance"} == set(kernels)
    for entry in kernels.values():
        binary = entry["binaries"]["sm_90"]
        assert binary["stack"] == 0 and binary["scratch"] == 0
        assert len(binary["parameters"]) == len(entry["arguments"]) + 2
        assert bytes(artifact.bytes(binary["file"])[:4]) == b"\x7fELF"
    assert all(not entry.file or "packed" not in t for t, entry in artifact.tensors.items())


def test_sources_stand_under_the_lines_of_the_graph(artifacts: dict[str, Path]) -> None:
    artifact = open_artifact(artifacts["llada2"])
    text = artifact.text("kernels.py")
    ast.parse(text)
    for name in _kernels(artifact):
        assert f"# {name}: " in text
    assert "dcompile.moe_ffn(" in text and "def sort_by_expert(" in text
    assert "def commit(" in text and "index_put.default(canvas" in text
    assert "/home" not in text and "/work" not in text


def test_explain_tells_registers_spills_and_launches(artifacts: dict[str, Path]) -> None:
    told = explain(artifacts["sdar_moe"])
    assert "registers spills" in told and "10 launches a layer: 2 layers" in told
    assert "sm_90" in told and "moe_ffn_down" in told


def test_without_a_gpu_loading_says_so(artifacts: dict[str, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DcompileError) as refused:
        Runner.load(artifacts["llada"])
    assert refused.value.remedy


def test_the_same_bytes_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing kept, another working folder, another place of the checkpoint."""
    made = []
    for name in ("first", "a second, elsewhere"):
        root = tmp_path / name
        root.mkdir()
        folder = write_checkpoint(root / "checkpoint", "llada", num_hidden_layers=1, n_layers=1)
        monkeypatch.chdir(root)
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        options = Options(target="cuda:sm_90", max_length=64, block_length=8)
        made.append(open_artifact(compile_checkpoint(folder, options, root / "model.dcx")))
    first, second = (m.manifest["files"] for m in made)
    assert first == second


def test_a_machine_without_triton_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcompile.codegen.triton import aot

    def missing() -> str:
        raise BuildError("compiling for CUDA needs Triton", remedy="pip install triton")

    monkeypatch.setattr("dcompile.codegen.backends.compiler_version", missing)
    assert aot.compiler_version()
    folder = write_checkpoint(tmp_path / "checkpoint", "llada")
    with pytest.raises(BuildError, match="Triton"):
        _compile(folder, tmp_path)
    assert not (tmp_path / "model.dcx").exists()


@pytest.mark.parametrize("target", ["cuda:", "cuda:sm_75", "cuda:90x", "rocm"])
def test_unknown_targets_are_refused(target: str) -> None:
    with pytest.raises(OptionError, match="target"):
        Options(target=target).validate()
