"""Fusions of a few nodes: the graph before and after, and the case that must be left alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from check import check_pass

from dcompile.passes.canonicalize import Canonicalize
from dcompile.passes.find_roles import FindRoles
from dcompile.passes.fuse_add_rms_norm import FuseAddRMSNorm
from dcompile.passes.fuse_silu_mul import FuseSiluMul
from dcompile.passes.merge_projections import MergeProjections


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def test_fuses_a_gate() -> None:
    check_pass(
        FuseSiluMul(),
        lambda g, u: (F.silu(g) * u,),
        {"g": randn(5, 8), "u": randn(5, 8)},
        after="""
            v0: f32[R, 8] = dcompile.silu_mul(g, u)
            return (v0,)
        """,
    )


def test_fuses_a_gate_on_the_right() -> None:
    check_pass(
        FuseSiluMul(), lambda g, u: (u * F.silu(g),), {"g": randn(5, 8), "u": randn(5, 8)}, places=1
    )


def test_leaves_a_gate_that_is_read_twice() -> None:
    def twice(g: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate = F.silu(g)
        return gate * u, gate

    check_pass(FuseSiluMul(), twice, {"g": randn(5, 8), "u": randn(5, 8)}, places=0)


def test_leaves_a_gate_that_is_broadcast() -> None:
    check_pass(
        FuseSiluMul(), lambda g, u: (F.silu(g) * u,), {"g": randn(5, 1), "u": randn(5, 8)}, places=0
    )


def test_fuses_a_residual_norm_and_keeps_the_sum() -> None:
    def residual(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x + r
        return F.rms_norm(total, (8,), w, 1e-5), total

    check_pass(
        FuseAddRMSNorm(),
        residual,
        {"x": randn(5, 8), "r": randn(5, 8)},
        {"w": randn(8)},
        after="""
            v0: (f32[R, 8], f32[R, 8]) = dcompile.add_rms_norm(x, r, w, 1e-05)
            v1: f32[R, 8] = getitem(v0, 0)
            v2: f32[R, 8] = getitem(v0, 1)
            return (v2, v1)
        """,
    )


def test_leaves_a_norm_of_a_scaled_sum() -> None:
    def scaled(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return (F.rms_norm(torch.add(x, r, alpha=2), (8,), w, 1e-5),)

    inputs = {"x": randn(5, 8), "r": randn(5, 8)}
    check_pass(FuseAddRMSNorm(), scaled, inputs, {"w": randn(8)}, places=0)


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
