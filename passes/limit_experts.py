"""route  ->  route_limited: an expert takes so many tokens, a block reads so many experts"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from dcompile.errors import OptionError
from dcompile.ir import operators
from dcompile.ir.edit import replace as put
from dcompile.ir.edit import value
from dcompile.ir.program import Exactness, Program


@dataclass(frozen=True)
class LimitExperts:
    """Capacity-aware inference and block expert pools, by the user's choice; see ir/operators/route_limited.py.

    Raises OptionError where the program has no router, or one that the limits do not fit.
    """

    capacity: float | None = None
    overflow: str = "drop"
    pool: int | None = None

    exactness = Exactness.APPROXIMATE

    def __call__(self, program: Program) -> int:
        sites = list(program.calls(operators.ROUTE))
        if not sites:
            raise OptionError(
                "the model has no mixture of experts whose tokens could be limited",
                remedy="leave --moe-capacity and --expert-pool out; `dcompile explain --remarks missed` of "
                "an artifact without them says why experts were not found",
            )
        for node in sites:
            self._limit(program, node)
        return len(sites)

    def _limit(self, program: Program, node: Node) -> None:
        logits, bias, top_k, *how = node.args
        assert isinstance(logits, Node) and isinstance(top_k, int)
        experts = int(value(logits).shape[-1])
        if self.pool is not None and not top_k <= self.pool <= experts:
            raise OptionError(
                f"a pool of {self.pool} experts, where a token chooses {top_k} of {experts}",
                remedy=f"--expert-pool from {top_k} to {experts}",
            )
        names = ("row_seq", "row_pos", "block_seq", "block_pos")
        places = [program.placeholder(name) for name in names]
        limits = (float(self.capacity or 0.0), self.overflow == "reroute", self.pool or 0)
        put(program, node, operators.ROUTE_LIMITED, logits, bias, *places, top_k, *how, *limits)
