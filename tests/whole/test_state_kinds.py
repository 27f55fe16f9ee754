"""What each state is, by the names of real compiles; and the bytes that serving a request moves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from checkpoints import write_checkpoint

from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.cuda.executor import CudaExecutor
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.opening import open_backend
from dcompile.runtime.plan import Plan

LENGTH, BLOCK, SLOTS, LAYERS = 64, 8, 3, 2
KINDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "plain": ({}, {}),
    "policy": ({"policy": "credit"}, {"credit": "policy", "credit_token": "policy"}),
    "smoothing": ({"smoothing": 0.3}, {"soft": "soft"}),
}


@pytest.fixture(scope="module", params=["cpu", "cuda:sm_90"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Artifact]:
    """Artifacts of a model of two layers, by the name of their options."""
    root = tmp_path_factory.mktemp("kinds")
    checkpoint = write_checkpoint(root / "checkpoint", "llada", n_layers=LAYERS)
    base = Options(target=request.param, max_length=LENGTH, batch=SLOTS, block_length=BLOCK)

    def made(name: str) -> Artifact:
        out = root / f"{name}.dcx"
        if not out.exists():
            given = base.changed(cache="dual", **KINDS[name][0])
            compile_checkpoint(checkpoint, given, out)
        return open_artifact(out)

    return made


def kinds(plan: Plan) -> dict[str, str]:
    return {name: plan.buffers[index].holds for name, index in plan.state.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_says_what_each_state_is(name: str, compiled: Callable[[str], Artifact]) -> None:
    plan = compiled(name).plan
    found = kinds(plan)
    own = KINDS[name][1]
    assert {n: kind for n, kind in found.items() if kind not in ("kv", "canvas")} == own
    assert Counter(found.values()) == Counter(["canvas", *["kv"] * 2 * LAYERS, *own.values()])
    assert found["canvas"] == "canvas"
    # A plan from before says nothing: what cannot be told is zeroed for each request, as before.
    text = json.loads(json.dumps(plan.text))
    for buffer in text["buffers"]:
        buffer["place"].pop("holds", None)
    old = kinds(Plan.read(text, "old"))
    assert old == {n: "policy" if kind == "soft" else kind for n, kind in found.items()}


class Moved:
    """Counts the bytes that an executor clears, brings over and fetches, by state."""

    def __init__(self, executor: Backend, patch: pytest.MonkeyPatch) -> None:
        self.cleared, self.copied = Counter[str](), Counter[str]()
        plan = executor.plan
        size = {n: plan.buffers[i].bytes(1, 1) // SLOTS for n, i in plan.state.items()}
        clear = executor.clear

        def counted(name: str, slot: int) -> None:
            self.cleared[name] += size[name]
            clear(name, slot)

        patch.setattr(executor, "clear", counted)
        if not isinstance(executor, CudaExecutor):
            return
        mirrors, device = executor.memory.state, executor.device
        begins = {executor.memory._places[i]: name for name, i in plan.state.items()}

        def noted(copy: Any, address: int, count: int) -> None:
            for begin, name in begins.items():
                if begin <= address < begin + SLOTS * size[name]:
                    self.copied[f"{copy} {name}"] += count

        for way in ("upload", "download", "fill"):
            original = getattr(device, way)

            def wrapped(
                one: int, two: int, count: int, way: str = way, call: Any = original
            ) -> None:
                noted(way, two if way == "download" else one, count)
                call(one, two, count)

            patch.setattr(device, way, wrapped)
        assert mirrors is executor.state


@pytest.mark.parametrize("name", KINDS)
def test_no_keys_and_values_move_for_a_request(
    name: str,
    compiled: Callable[[str], Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = compiled(name)
    fake = fake_cuda.load(fake_cuda.build(tmp_path), tmp_path)
    cuda = artifact.manifest["target"] == "cuda"
    executor = CudaExecutor(artifact, fake.device()) if cuda else open_backend(artifact)
    plan = artifact.plan
    own = KINDS[name][1]
    size = {n: plan.buffers[i].bytes(1, 1) // SLOTS for n, i in plan.state.items()}
    runner = Runner(artifact, executor)
    moved = Moved(executor, monkeypatch)
    runner.slots[1].admit([1, 2, 3])
    assert moved.cleared == {n: size[n] for n in own}
    if not cuda:
        return
    seen = ["canvas", *(n for n, kind in own.items() if kind == "policy")]
    filled = {f"fill {n}": size[n] for n in own}
    assert moved.copied == {**{f"upload {n}": size[n] for n in seen}, **filled}
    moved.copied.clear()
    executor.push(1)
    assert moved.copied == {f"upload {n}": size[n] for n in seen}
    moved.copied.clear()
    executor.pull(1)
    assert moved.copied == {f"download {n}": size[n] for n in seen}
    pinned = sum(tensor.nbytes for tensor in executor.memory.state._held.values())
    assert pinned == SLOTS * sum(size[n] for n in seen)
