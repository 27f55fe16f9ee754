"""`verify` and likelihoods over a CUDA artifact: its own runtime on the fake driver, kernels interpreted."""

from __future__ import annotations

import json
from pathlib import Path

import fake_cuda
import interpreter  # first of all
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from fake_cuda import FakeCuda
from interpreted_gpu import InterpretedGpu

from dcompile.decoding.scoring import Scorer
from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import DeviceError, VerificationError
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.cuda import driver
from dcompile.runtime.cuda.executor import CudaExecutor
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.writing import write_artifact
from dcompile.verify.command import verify

assert interpreter
GIVEN = Options(max_length=16, batch=2, block_length=4, cache="none", policy="likelihood")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, and its artifacts for the processor and for a GPU, in float32."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("made")
    sizes = {"num_hidden_layers": 1, "moe_layer_freq": [1], "num_experts": 4}
    folder = write_checkpoint(root / "checkpoint", "llada_moe", **sizes)
    cpu = compile_checkpoint(folder, GIVEN, root / "cpu.dcx")
    return (
        folder,
        cpu,
        compile_checkpoint(folder, GIVEN.changed(target="cuda:sm_90"), root / "a.dcx"),
    )


@pytest.fixture
def fake(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FakeCuda:
    found = fake_cuda.load(fake_cuda.build(tmp_path), tmp_path)
    InterpretedGpu(found, tmp_path).add_artifact(open_artifact(made[2]))
    monkeypatch.setattr(driver, "LIBRARY", str(found.library))
    return found


def test_verify_compares_each_launch(made: tuple[Path, Path, Path], fake: FakeCuda) -> None:
    with fake.raising():
        report = verify(made[2], made[0])
    launches = len(open_artifact(made[2]).plan.launches)
    assert f"{launches} launches, each within" in report and "binaries: equal" in report


def test_a_kernel_that_departs_is_found(made: tuple[Path, Path, Path], fake: FakeCuda) -> None:
    """The output of the experts is overwritten behind every launch of their last kernel."""
    digest = next(
        fake.digest(bytes(open_artifact(made[2]).bytes(file)))
        for file in open_artifact(made[2]).names
        if "moe_ffn_down" in file and file.endswith(".cubin")
    )
    right = fake.by_digest[digest]

    def wrong(launch: fake_cuda.Launched) -> None:
        right(launch)
        y = launch.array(0, np.float32, 8)
        y[3] += 1.0

    fake.by_digest[digest] = wrong
    with pytest.raises(VerificationError, match="layer 0 departs") as found, fake.raising():
        verify(made[2], made[0])
    assert "down" in str(found.value)


def test_likelihoods_are_those_of_the_processor(
    made: tuple[Path, Path, Path], fake: FakeCuda
) -> None:
    wanted = Scorer(Runner.load(made[1]))
    artifact = open_artifact(made[2])
    with fake.raising():
        found = Scorer(Runner(artifact, CudaExecutor(artifact)))
        text = [5, 6, 7, 8, 9]
        near = pytest.approx(wanted.log_likelihood([1, 2], text, 3), rel=1e-5)
        assert found.log_likelihood([1, 2], text, 3) == near
        assert found.is_greedy([1], [2]) == wanted.is_greedy([1], [2])


def test_without_a_driver_it_says_what_can_be_compared(
    made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libnothing.so.1")
    with pytest.raises(DeviceError, match="no NVIDIA driver") as refused:
        verify(made[2], made[0])
    assert "--no-run" in str(refused.value)
    report = verify(made[2], made[0], run_model=False)
    assert "tensors" in report and "binaries: equal" in report


def test_an_altered_kernel_table_is_found(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    artifact = open_artifact(made[2])
    files = {
        n: bytes(artifact.bytes(n))
        for n in artifact.names
        if not n.startswith("weights/") and n not in ("plan.json", "manifest.json")
    }
    table = json.loads(files["kernels.json"])
    name = next(n for n in table["kernels"] if n.startswith("attend"))
    constants = dict(table["kernels"][name]["constants"])
    constants["SCALE"] *= 1.5
    table["kernels"][name]["constants"] = [[k, v] for k, v in constants.items()]
    files["kernels.json"] = json.dumps(table).encode()
    manifest = {
        k: v for k, v in artifact.manifest.items() if k not in ("files", "sha256", "format")
    }
    names = sorted({b.tensor for b in artifact.plan.buffers if b.kind == "weight"})
    tensors = [(n, artifact.weights(n).copy()) for n in names]
    write_artifact(tmp_path / "bad.dcx", manifest, artifact.plan.text, tensors, files)
    with pytest.raises(VerificationError, match=name):
        verify(tmp_path / "bad.dcx", made[0], run_model=False)
