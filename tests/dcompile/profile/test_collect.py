"""A profile of a CUDA artifact on the fake GPU: times come from events, graphs are off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gpu_toy
import pytest
import toy
from fake_cuda import FakeCuda
from toy import Toy

from dcompile.profile import profile_artifact
from dcompile.profile.collect import UNKNOWN_RATE
from dcompile.profile.summary import summarize
from dcompile.runtime.cuda import driver


def test_times_of_launches_are_the_gpus(
    tmp_path: Path, on_gpu: Callable[[Toy], FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Toy()
    fake = on_gpu(case)
    layer = fake.kernels["toy_layer"]
    fake.kernels["toy_layer"] = lambda launch: (layer(launch), fake.spend(2))  # type: ignore
    monkeypatch.setattr(driver, "LIBRARY", str(fake.library))
    artifact = gpu_toy.write(tmp_path / "a.dcx", case)
    with fake.raising():
        captured = profile_artifact(artifact, [[1, 3, 4]], 8, rounds=2)
    for timed in captured.chosen.iterations:
        assert [round(s * 1e3, 3) for s in timed.seconds] == [1, 3, 3, 1, 1]
    assert captured.machine.rate == UNKNOWN_RATE and captured.machine.bandwidth > 0
    found = summarize(captured)
    assert found.target == "cuda" and '"toy_layer"' in found.json()
    # What was looked at is what the canvas came to: every block is decided in the end.
    assert len(captured.results[0].all_tokens) == 8
    assert (captured.seen[-1].after[0, 3:11] != toy.MASK).all()
