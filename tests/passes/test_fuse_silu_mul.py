"""silu(gate) * up is one operator, where nothing else reads the gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from check import check_pass, randn

from dcompile.passes.fuse_silu_mul import FuseSiluMul


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
