"""Two tiny models compiled from end to end: stages, plan and report, compared with tests/golden.

`make golden` (DCOMPILE_ACCEPT_GOLDEN=1) rewrites them; a reviewer sees in the diff what a change did.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from dcompile.driver.compile import compile_checkpoint
from dcompile.explain.command import explain
from dcompile.options import Options

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {"tiny_dense": "llada", "tiny_moe": "llada_moe"}


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="export's names differ between torch versions"
)
@pytest.mark.parametrize("name", MODELS)
def test_a_compile_reads_as_it_did(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", MODELS[name])
    options = Options(max_length=64, batch=2, block_length=8, cache="dual")
    out = compile_checkpoint(folder, options, tmp_path / "out")
    made = {p.relative_to(out).as_posix(): p.read_text() for p in sorted(out.rglob("stages/*.txt"))}
    for extra in ("plan.json", "report.txt", "kernels.cpp"):
        made[extra] = (out / extra).read_text()
    golden = GOLDEN / name
    if os.environ.get("DCOMPILE_ACCEPT_GOLDEN"):
        for old in golden.rglob("*.*"):
            old.unlink()
        for file, text in made.items():
            (golden / file).parent.mkdir(parents=True, exist_ok=True)
            (golden / file).write_text(text)
    kept = {
        p.relative_to(golden).as_posix(): p.read_text() for p in golden.rglob("*") if p.is_file()
    }
    assert sorted(made) == sorted(kept)
    for file, text in made.items():
        assert text == kept[file], f"{file} changed; `make golden` accepts it"


def test_explain_shows_the_diff_of_a_pass(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "llada_moe")
    out = compile_checkpoint(folder, Options(max_length=64, block_length=8), tmp_path / "m.dcx")
    diff = explain(out, "fuse_moe")
    assert any(line.startswith("+moe_ffn") for line in diff.splitlines())
    assert any(line.startswith("-") and "einsum" in line for line in diff.splitlines())
    assert "at most" in explain(out)
