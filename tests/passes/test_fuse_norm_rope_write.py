"""The rotary embedding of halves is one operator with the write; another rotation stays."""

from __future__ import annotations

import pytest
import torch
from planned import Model, count, left_alone, planned
from torch import Tensor

from dcompile.ir import operators


def test_leaves_another_rotation() -> None:
    class Interleaved(Model):
        def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return x * cos + x.flip(-1) * sin

    program = planned(Interleaved())
    assert count(program, operators.WRITE_ROWS) == 2 and not count(
        program, operators.NORM_ROPE_WRITE
    )
    assert left_alone(program, "fuse_norm_rope_write")


@pytest.mark.parametrize("rest", [slice(None, 4), slice(None, None, 2)])
def test_leaves_a_rotation_with_another_rest(rest: slice) -> None:
    """What follows the rotated half of a head must be its other half."""

    class Partial(Model):
        def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            turned = super().rotate(x[..., :4], cos[..., :4], sin[..., :4])
            return torch.cat((turned, x[..., rest]), -1)

    program = planned(Partial())
    assert not count(program, operators.NORM_ROPE_WRITE) and left_alone(
        program, "fuse_norm_rope_write"
    )


def test_fuses_a_rotation_of_half_a_head() -> None:
    class Partial(Model):
        def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            turned = super().rotate(x[..., :4], cos[..., :4], sin[..., :4])
            return torch.cat((turned, x[..., 4:]), -1)

    assert count(planned(Partial()), operators.NORM_ROPE_WRITE) == 1
