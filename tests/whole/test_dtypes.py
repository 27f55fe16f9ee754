"""A checkpoint compiled in another dtype than its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, write_checkpoint

import dcompile
from dcompile.driver.compile import compile_checkpoint
from dcompile.driver.origin import open_origin, trace_origin
from dcompile.driver.settle import settle
from dcompile.options import Options


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_traced_in_another_dtype(tmp_path: Path, family: str, dtype: str) -> None:
    stored = torch.bfloat16 if dtype == "float32" else torch.float32
    folder = write_checkpoint(tmp_path / "checkpoint", family, dtype=stored)
    options = Options(dtype=dtype, max_length=64)
    origin = open_origin(folder, options)
    wanted = getattr(torch, dtype)
    program = trace_origin(origin, settle(options, origin.spec), lambda _: None)
    kept = {"expert_bias"}
    held = {
        node.name: node.meta["val"].dtype
        for node in program.graph.nodes
        if node.op == "placeholder" and program.input(node.name).kind == "weight"
    }
    assert held
    assert {d for name, d in held.items() if not name.endswith(tuple(kept))} == {wanted}


def test_a_stored_float32_checkpoint_runs_in_bfloat16(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "llada_moe")
    options = Options(dtype="bfloat16", max_length=64, block_length=8)
    path = compile_checkpoint(folder, options, tmp_path / "model.dcx")
    (result,) = dcompile.load(path).generate([[1, 2, 3]], gen_length=16)
    assert len(result.all_tokens) == 16
