"""Each linear layer is called by what it is for, where exactly one can be meant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from check import check_pass, randn
from planned import Model, planned
from torch import Tensor

from dcompile.ir.meta import facts
from dcompile.ir.program import Program
from dcompile.passes.find_roles import FindRoles


def roles(program: Program) -> dict[str, str]:
    """The role of each linear layer, by its weight."""
    calls = program.calls(torch.ops.aten.linear.default)
    return {node.args[1].name: facts(node).role for node in calls}


def test_names_what_stands_around_attention_and_the_choice() -> None:
    found = roles(planned(Model(), stop_after="find_roles"))
    wanted = {"q_weight": "q", "k_weight": "k", "v_weight": "v", "o_weight": "o"}
    assert found == {**wanted, "head_weight": "head", "gate_weight": ""}


def test_names_a_gated_network() -> None:
    def ffn(x: Tensor, g: Tensor, u: Tensor, d: Tensor) -> tuple[Tensor]:
        return (F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d),)

    weights = {"g": randn(6, 8), "u": randn(6, 8), "d": randn(8, 6)}
    program = check_pass(FindRoles(), ffn, {"x": randn(5, 8)}, weights, places=3)
    assert roles(program) == {"g": "gate", "u": "up", "d": "down"}


def test_a_gate_of_two_layers_has_no_name() -> None:
    def ffn(x: Tensor, g: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor]:
        return (F.silu(F.linear(x, g) + F.linear(x, h)) * F.linear(x, u),)

    weights = {"g": randn(6, 8), "h": randn(6, 8), "u": randn(6, 8)}
    program = check_pass(FindRoles(), ffn, {"x": randn(5, 8)}, weights, places=1)
    assert roles(program) == {"g": "", "h": "", "u": "up"}
