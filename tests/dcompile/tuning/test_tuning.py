"""Tuning on the fake GPU: what is tried, what is timed, what is kept."""

from __future__ import annotations

import ctypes
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from fake_cuda import FakeCuda, Launched
from kernel_shapes import MODELS, lowerings, variants

from dcompile.cli import main
from dcompile.codegen.kernels import linear
from dcompile.codegen.triton import tiles as configurations
from dcompile.codegen.triton import tuned
from dcompile.codegen.triton.tiles import ARCHITECTURES, Tiles
from dcompile.codegen.triton.tuned import Shape
from dcompile.codegen.triton.variant import Variant
from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import OptionError, OutputError
from dcompile.options import Options
from dcompile.runtime.cuda import driver
from dcompile.tuning import measure, select
from dcompile.tuning.command import shown, tune_path
from dcompile.tuning.measure import Outcome, Trial, merged
from dcompile.tuning.problems import Problem, problems
from dcompile.tuning.select import shared_bytes, worth_trying

SMALL = Problem(Shape("linear", (("n", 256), ("k", 512)), "bf16"))


def table_of(model: str) -> dict[str, Any]:
    """What kernels.json says of a real checkpoint's kernels, but for their binaries."""
    return {v.name: v.to_json() for v in variants(lowerings(MODELS[model], 90))}


@pytest.mark.parametrize("model", MODELS)
def test_a_models_problems_are_its_kernels(model: str) -> None:
    """Each problem's launches are those of the model again, when its tiles are the default."""
    m = MODELS[model]
    found = problems(table_of(model))
    families = {problem.shape.family for problem in found}
    assert families >= {"linear", "attend", "vocab_choice"}
    assert ({"gate_up", "down"} <= families) == (m.experts is not None)
    assert ("gated" in families) == (m.ffn is not None)
    known = {(v.kernel, sizes(v)) for v in variants(lowerings(m, 90))}
    for problem in found:
        made = problem.lowering(90, problem.default(90))
        # Tiles of attention follow the block; it is tuned for blocks of 32.
        assert (problem.shape.family == "attend" and m.block != 32) or {
            (v.kernel, sizes(v)) for v in variants([made])
        } <= known
        assert problem.shape.key.endswith(" bf16")


def sizes(variant: Variant) -> tuple[tuple[str, Any], ...]:
    """Its numbers, but for the mask id, which is not part of a shape."""
    kept = [(n, v) for n, v in variant.constants if type(v) is int and n != "MASK"]
    return tuple(sorted(kept))


def test_operands_are_those_of_the_launches() -> None:
    small = {
        "linear": {"n": 64, "k": 32},
        "gated": {"n": 64, "k": 32},
        "gate_up": {"n": 32, "k": 64, "e": 5, "top": 2, "shared": 1},
        "down": {"n": 64, "k": 32, "e": 5, "top": 2, "shared": 1},
        "attend": {"h": 4, "g": 2, "d": 16, "positions": 64},
        "vocab_choice": {"v": 100, "d": 32, "length": 4},
    }
    for family, sizes in small.items():
        problem = Problem(Shape(family, tuple(sizes.items()), "bf16"))
        lowering = problem.lowering(90, problem.default(90))
        wanted = {
            b.name for s in lowering.steps for b in s.bindings if type(b).__name__ == "Operand"
        }
        assert wanted == set(problem.operands(8, "cpu")), family


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_tried_fits(arch: int) -> None:
    for model in MODELS:
        for problem in problems(table_of(model)):
            tried = worth_trying(problem, arch, 12)
            assert tried[0] == problem.default(arch)
            assert 2 <= len(tried) == len(set(tried)) <= 12
            limit = ARCHITECTURES[arch].shared
            assert all(shared_bytes(problem, tiles) <= limit for tiles in tried[1:])


def spend(fake: FakeCuda, cost: Any) -> list[Launched]:
    """Let products take what `cost` says of their grid, in microseconds; notes their arguments."""
    launched: list[Launched] = []

    def product(launch: Launched) -> None:
        launched.append(launch)
        assert launch.value(0, ctypes.c_uint64) % 256 == 0
        rows = launch.array(1, np.uint16, 32, 512)
        assert rows.any()
        fake.spend(cost(launch.grid) / 1000 - 1)

    fake.kernels = {"linear": product}
    return launched


def test_the_fastest_is_kept(fake: FakeCuda) -> None:
    cost = lambda grid: 10 + grid[1] * grid[2]  # noqa: E731 - fewer programs are faster here
    launched = spend(fake, cost)
    device = fake.device()
    before = fake.live
    (outcome,) = measure.tune([SMALL], device, most=5, rounds=3)
    assert fake.live == before
    assert len(outcome.trials) == 5
    for trial in outcome.trials:
        if trial.seconds is None:
            assert trial.refused
            continue
        (step,) = SMALL.lowering(90, trial.tiles).steps
        _, columns, splits = step.variant.grid
        assert trial.seconds == pytest.approx(cost((0, columns, splits)) * 1e-6, rel=1e-3)
    ran = [t for t in outcome.trials if t.seconds is not None]
    assert len(ran) >= 2 and len(launched) == 5 * len(ran)
    fastest = min(ran, key=lambda t: t.seconds)
    assert fastest.seconds < outcome.default.seconds and outcome.best is fastest


def test_noise_does_not_leave_the_default() -> None:
    other, default = Tiles(16, 64, 64), Tiles(32, 64, 128)
    near = Outcome(SMALL, [Trial(default, 1.0), Trial(other, 0.99)])
    far = Outcome(SMALL, [Trial(default, 1.0), Trial(other, 0.9)])
    broken = Outcome(SMALL, [Trial(default, None, "spills"), Trial(other, 2.0)])
    nothing = Outcome(SMALL, [Trial(default, None, "spills")])
    assert (
        near.best is near.default and far.best is far.trials[1] and broken.best is broken.trials[1]
    )
    assert nothing.best is None and "none ran: spills" in str(
        list(shown([nothing]).columns[4].cells)
    )


def test_tiles_that_are_refused_are_not_timed(fake: FakeCuda) -> None:
    """Spilling tiles: the compiler takes them, the gate does not."""
    spiller = Tiles(128, 128, 32, warps=1, stages=2)
    (made,) = select.compiled(SMALL, 90, [spiller])
    assert isinstance(made, str) and made.startswith("spills")


def test_a_table_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = Tiles(16, 128, 64, splits=2, warps=8, stages=2)
    outcome = Outcome(SMALL, [Trial(SMALL.default(90), 2e-5), Trial(tiles, 1e-5)])
    table = merged({"sm_80": {"x": {"tiles": {}}}}, [outcome], 90, "Fake GPU")
    assert table["sm_80"] == {"x": {"tiles": {}}}
    monkeypatch.setattr(tuned, "_table", lambda: tuned.read(tuned.written(table)))
    assert configurations.linear_tiles(256, 512, "bf16", 90) == tiles
    assert configurations.linear_tiles(256, 512, "bf16", 80) != tiles
    assert configurations.linear_tiles(512, 256, "bf16", 90) != tiles
    lowering = linear.launches(rows={"R": 1}, n=256, k=512, dtype="bf16", arch=90)
    assert dict(lowering.steps[0].variant.constants)["BN"] == 128
    kept = tuned.recorded([s.variant for s in lowering.steps], 90)
    assert kept == {"linear n256 k512 bf16": outcome.entry("Fake GPU")}
    assert kept["linear n256 k512 bf16"]["tiles"] == asdict(tiles)


def test_the_shipped_table_is_one() -> None:
    table = tuned.read(tuned.path().read_text())
    assert tuned.path().read_text() == tuned.written(table)
    for name, entries in table.items():
        assert int(name.removeprefix("sm_")) in ARCHITECTURES
        for key, entry in entries.items():
            assert key.split()[0] in {family for family, _ in tuned.FAMILIES.values()}
            assert Tiles(**entry["tiles"])


def test_without_a_gpu(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(tmp_path / "model.dcx")])
    assert ended.value.code == 1
    assert "DeviceError: this machine has no NVIDIA driver" in capsys.readouterr().err


def test_the_command(
    fake: FakeCuda, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an artifact's table of kernels to a table of tiles, over one that is there already."""
    monkeypatch.setattr(driver, "LIBRARY", str(fake.library))
    (step,) = SMALL.lowering(90, SMALL.default(90)).steps
    kernels = {step.variant.name: step.variant.to_json()}
    monkeypatch.setattr("dcompile.tuning.command._artifact", lambda *_: None)
    monkeypatch.setattr("dcompile.tuning.command.table_of", lambda _: kernels)
    spend(fake, lambda grid: 10 + grid[1])
    out = tmp_path / "tiles.json"
    out.write_text('{"sm_80": {}}')
    asked = ["tune", "model.dcx", "--most", "3", "--out", str(out)]
    main_or_exit(asked)
    table = json.loads(out.read_text())
    assert table["sm_80"] == {} and list(table["sm_90"]) == ["linear n256 k512 bf16"]
    assert "linear n256 k512 bf16" in capsys.readouterr().out
    assert table["sm_90"]["linear n256 k512 bf16"]["device"] == "Fake GPU"
    with pytest.raises(SystemExit):
        main([*asked, "--families", "attend"])
    assert OptionError.__name__ in capsys.readouterr().err
    out.write_text("[")
    with pytest.raises(SystemExit):
        main(asked)
    assert OutputError.__name__ in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_is_compiled_for_the_gpu_that_is_here(
    fake: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stands in: the checkpoint becomes an artifact, its kernels problems, these a table."""
    monkeypatch.setattr(driver, "LIBRARY", str(fake.library))
    sizes = {"num_hidden_layers": 1, "n_layers": 1}
    folder = write_checkpoint(tmp_path / "checkpoint", "llada", dtype=torch.bfloat16, **sizes)
    fake.kernels = {"gated": lambda launch: fake.spend((10 + launch.grid[1]) / 1000 - 1)}
    said: list[str] = []
    out = tmp_path / "tiles.json"
    found = tune_path(folder, families=["gated"], most=2, out=out, progress=said.append)
    assert said[0] == "compiling the checkpoint" and len(found) == 1
    (key,) = json.loads(out.read_text())["sm_90"]
    assert key == found[0].problem.shape.key and key.startswith("gated ")
    cpu = compile_checkpoint(folder, Options(max_length=32), tmp_path / "cpu.dcx")
    with pytest.raises(OptionError, match="no kernels to tune"):
        tune_path(cpu, out=out)


def main_or_exit(arguments: list[str]) -> None:
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code
