"""Views, casts and copies are spelled one way; what changes numbers or order stays."""

from __future__ import annotations

import torch
from check import check_pass, randn

from dcompile.passes.canonicalize import Canonicalize


def test_canonicalize_spells_views_one_way() -> None:
    def views(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = x.view(x.shape[0], 2, 4).transpose(1, 2).transpose(1, 2).contiguous().chunk(2, -1)
        return a.unsqueeze(0).squeeze(0).clone(), b.to(torch.float32).flatten(1)

    check_pass(
        Canonicalize(),
        views,
        {"x": randn(5, 8)},
        after="""
            v0: f32[R, 2, 4] = reshape.default(x, [-1, 2, 4])
            v1: f32[R, 2, 2] = slice.Tensor(v0, 2, 0, 2)
            v2: f32[R, 2, 2] = slice.Tensor(v0, 2, 2, 4)
            v3: f32[R, 4] = reshape.default(v2, [-1, 4])
            return (v1, v3)
        """,
    )


def test_canonicalize_leaves_a_real_permutation_and_cast() -> None:
    def real(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.transpose(0, 1), x.to(torch.bfloat16)

    program = check_pass(Canonicalize(), real, {"x": randn(5, 8)}, places=0)
    targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert targets == {torch.ops.aten.permute.default, torch.ops.aten._to_copy.default}
