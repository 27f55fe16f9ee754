"""The step as an AOTInductor package: run where dcompile cannot be imported, equal to the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, MASK

from dcompile.errors import BuildError, OutputError
from dcompile.export import pt2
from dcompile.export.command import Asked, export
from dcompile.export.pt2 import write_pt2
from dcompile.export.source import open_source
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options

SMALL = {"num_hidden_layers": 1, "moe_layer_freq": [1]}
# Runs each case of a file of tensors through a package, knowing nothing but torch.
RUN = """
import json, sys
sys.modules["dcompile"] = None
import torch
step = torch._inductor.aoti_load_package(sys.argv[1])
said = json.loads(step.loader.get_metadata()["dcompile"])
out = []
for given in torch.load(sys.argv[2], weights_only=True):
    values = step(*(given[port["name"]] for port in said["inputs"]))
    out.append(dict(zip(said["outputs"], values)))
torch.save(out, sys.argv[3])
print(json.dumps(said))
"""
CASES = [
    ("llada_moe", SMALL),
    *(pytest.param(family, {}, marks=pytest.mark.slow) for family in FAMILIES),
]


@pytest.mark.parametrize(("family", "config"), CASES)
def test_torch_alone_runs_the_step(
    make: Any, family: str, config: dict[str, object], tmp_path: Path
) -> None:
    made = make(family, config=config)
    out = export(Asked(made.artifact, tmp_path / "step.pt2", "pt2")).files[0]
    if config is SMALL:
        twin = export(Asked(made.folder, tmp_path / "twin.pt2", "pt2", options=made.options))
        assert twin.files[0].read_bytes() == out.read_bytes()
    checkpoint = open_checkpoint(made.folder)
    span, shift = checkpoint.spec.block_length, int(checkpoint.spec.shift)
    n = span or 8
    source = open_source(made.artifact, Options(), lambda _: None)
    caches = {
        name.replace("_", "."): item.shape[2:]
        for name in (i.name for i in source.program.inputs)
        if (item := source.program.input(name)).kind == "state" and name != "canvas"
    }
    random = torch.Generator().manual_seed(5)
    cases, wanted = [], []
    for lengths in ([n + 8, n + 3] if span is None else [2 * n, n], [2 * n]):
        blocks = torch.stack([torch.arange(size - n, size) for size in lengths])
        canvas = torch.randint(0, 95, (len(lengths), max(lengths)), generator=random)
        canvas.scatter_(1, blocks[:, : n // 2], MASK)
        batch = len(lengths)
        cases.append(
            {
                "canvas": canvas,
                "lengths": torch.tensor(lengths),
                "positions": torch.arange(max(lengths)).repeat(batch, 1),
                "block_positions": blocks,
                "temperature": torch.zeros(batch),
                "threshold": torch.full((batch,), 0.9),
                **{
                    name: torch.zeros(batch, dtype=torch.int64)
                    for name in ("iteration", "entered", "seed", "tick")
                },
                **{
                    name: torch.zeros(batch, max(lengths), *shape) for name, shape in caches.items()
                },
            }
        )
        with torch.no_grad():
            model = checkpoint.reference().double()
            wanted.append(
                [
                    model(canvas[i : i + 1, :size])[0][(blocks[i] - shift).clamp_min(0)]
                    for i, size in enumerate(lengths)
                ]
            )
    torch.save(cases, tmp_path / "in.pt")
    files = [str(out), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *files],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    said = json.loads(done.stdout)
    assert said["model"]["family"] == family
    assert [port["name"] for port in said["inputs"][:2]] == ["canvas", "lengths"]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for given, got, logits in zip(cases, found, wanted, strict=True):
        for i, each in enumerate(logits):
            error = (got["logits"][i].double() - each).norm() / each.norm()
            assert error < 1e-5
            live = given["canvas"][i, given["block_positions"][i]] == MASK
            best = each.clone()
            best[:, MASK] = -np.inf
            assert torch.equal(got["token"][i], torch.where(live, best.argmax(-1), -1))
        changed = got["new.canvas"] != given["canvas"]
        assert torch.equal(changed.gather(1, given["block_positions"]), got["commit"])
        assert changed.any(1).all()


def test_errors_have_names(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("llada_moe", config=SMALL)
    with pytest.raises(OutputError, match=r"not named step.onnx(.|\n)*step.pt2"):
        export(Asked(made.artifact, tmp_path / "step.onnx", "pt2"))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(pt2.torch._inductor, "aoti_compile_and_package", broken)
    source = open_source(made.artifact, Options(), lambda _: None)
    with pytest.raises(BuildError, match=r"no compiler(.|\n)*g\+\+"):
        write_pt2(source, tmp_path / "step.pt2", "window", torch.float32)
    assert list(tmp_path.iterdir()) == []
