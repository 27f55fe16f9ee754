"""linear(x, a), linear(x, b)  ->  one linear layer, and the projections that must stay two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from check import check_pass, randn

from dcompile.passes.find_roles import FindRoles
from dcompile.passes.merge_projections import MergeProjections


def test_merges_gate_and_up() -> None:
    def ffn(x: torch.Tensor, g: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor]:
        return (F.silu(F.linear(x, g)) * F.linear(x, u),)

    program = check_pass(
        MergeProjections(),
        ffn,
        {"x": randn(5, 8)},
        {"g": randn(6, 8), "u": randn(6, 8)},
        places=1,
        prepare=[FindRoles()],
    )
    linears = list(program.calls(torch.ops.aten.linear.default))
    assert len(linears) == 1
    assert linears[0].meta["val"].shape[-1] == 12


def test_leaves_projections_whose_weight_is_computed() -> None:
    def ffn(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor]:
        return (F.silu(F.linear(x, g * 2)) * F.linear(x, g),)

    inputs, weights = {"x": randn(5, 8)}, {"g": randn(6, 8)}
    program = check_pass(MergeProjections(), ffn, inputs, weights, places=0, prepare=[FindRoles()])
    assert "computed" in program.remarks[-1].text


def test_merges_projections_that_share_their_weight() -> None:
    def ffn(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor]:
        return (F.silu(F.linear(x, g)) * F.linear(x, g), F.linear(x[1:], g))[:1]

    inputs, weights = {"x": randn(5, 8)}, {"g": randn(6, 8)}
    check_pass(MergeProjections(), ffn, inputs, weights, places=1, prepare=[FindRoles()])


def test_leaves_projections_of_different_inputs() -> None:
    def ffn(
        x: torch.Tensor, y: torch.Tensor, g: torch.Tensor, u: torch.Tensor
    ) -> tuple[torch.Tensor]:
        return (F.silu(F.linear(x, g)) * F.linear(y, u),)

    check_pass(
        MergeProjections(),
        ffn,
        {"x": randn(5, 8), "y": randn(5, 8)},
        {"g": randn(6, 8), "u": randn(6, 8)},
        places=0,
        prepare=[FindRoles()],
    )
