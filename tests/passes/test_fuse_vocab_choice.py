"""The vocabulary projection is one operator with the choice, where nothing stands between."""

from __future__ import annotations

import torch
from planned import Model, count, left_alone, planned
from torch import Tensor

from dcompile.ir import operators


def test_leaves_logits_that_are_changed_after_the_projection() -> None:
    class Capped(Model):
        def logits(self, x: Tensor) -> Tensor:
            return 30 * torch.tanh(self.head(x) / 30)

    program = planned(Capped())
    assert count(program, operators.CHOOSE) == 1 and not count(program, operators.VOCAB_CHOICE)
    assert left_alone(program, "fuse_vocab_choice")
