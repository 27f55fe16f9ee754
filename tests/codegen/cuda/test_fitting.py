"""Where the gate refuses a kernel's tiles, the next smaller ones are taken, and it is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from dcompile.codegen.kernels import linear
from dcompile.codegen.triton.tiles import Tiles, shrunk
from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import BuildError
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact

WIDE = Tiles(32, 128, 256, stages=4)  # more shared memory than a chip has


def compiled(root: Path, name: str) -> dict[str, dict[str, object]]:
    folder = root / "checkpoint"
    if not folder.exists():
        sizes = {"num_hidden_layers": 1, "n_layers": 1}
        write_checkpoint(folder, "llada", dtype=torch.bfloat16, **sizes)
    options = Options(target="cuda:sm_89", max_length=32, block_length=4)
    artifact = open_artifact(compile_checkpoint(folder, options, root / name))
    return json.loads(artifact.text("kernels.json"))


def test_refused_tiles_become_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "linear_tiles", lambda *_: WIDE)
    table = compiled(tmp_path, "first.dcx")
    products = {n: e for n, e in table["kernels"].items() if e["kernel"].endswith(":linear")}
    assert products and products.keys() <= table["refused_tiles"].keys()
    for name, entry in products.items():
        tried = table["refused_tiles"][name]
        assert all("shared memory" in problem for said in tried for problem in said["sm_89"])
        constants, smaller = dict(entry["constants"]), shrunk(WIDE, len(tried))
        assert (constants["BN"], constants["BK"]) == (smaller.columns, smaller.depth)
    assert compiled(tmp_path, "second.dcx") == table


def test_what_never_fits_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "linear_tiles", lambda *_: WIDE)
    monkeypatch.setattr(linear, "shrunk", lambda tiles, smaller: tiles)
    with pytest.raises(BuildError, match=r"linear\w* for sm_89: shared memory"):
        compiled(tmp_path, "never.dcx")


def test_tiles_shrink_until_nothing_is_left() -> None:
    seen = [shrunk(WIDE, times) for times in range(12)]
    assert seen[0] == WIDE and seen[-1] == seen[-2] == Tiles(16, 16, 32, stages=2)
    sizes = [t.rows * t.columns * t.depth * t.stages for t in seen[:10]]
    assert sizes == sorted(sizes, reverse=True)
    fixed = shrunk(WIDE, 12, least_rows=32, depth=False)
    assert (fixed.rows, fixed.depth) == (32, 256)
