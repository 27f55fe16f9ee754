"""The mixture of embeddings of smoothing against float64, over odd sizes and rows that are not live."""

from __future__ import annotations

import pytest
import torch
from interpreted import TYPES, poisoned, run

from dcompile.codegen.kernels import soft_embed
from dcompile.codegen.triton.tiles import Tiles


def mixed(t: str, given: dict[str, torch.Tensor], splits: int = 3) -> torch.Tensor:
    (R, D), V, E = given["x"].shape, len(given["w"]), given["table"].shape[1]
    y = poisoned(R, E, dtype=TYPES[t])
    lowering = soft_embed.launches(
        **{"rows": {"R": 1}, "vocab": V, "hidden": D, "width": E, "dtype": t, "arch": 90},
        bias=given.get("bias") is not None,
        tiles=Tiles(16, 32, 32, splits=2, stages=1),
        mixture=Tiles(16, 32, 16, splits=splits, stages=1),
    )
    run(lowering, {"y": y, **given}, R=R)
    return y


def drawn(t: str, R: int, D: int, V: int, E: int, more: int = 0) -> dict[str, torch.Tensor]:
    """Integers make the logits exact, so that none is rounded another way."""
    return {
        "x": torch.randint(-3, 4, (R, D)).to(TYPES[t]),
        "w": torch.randint(-1, 2, (V, D)).to(TYPES[t]),
        "table": torch.randn(V + more, E).to(TYPES[t]),
        "live": torch.rand(R) < 0.6,
        "weight": torch.rand(R),
    }


def reference(given: dict[str, torch.Tensor]) -> torch.Tensor:
    z = given["x"].double() @ given["w"].double().T
    if given.get("bias") is not None:
        z = z + given["bias"].double()
    z = z.to(given["x"].dtype).double()
    p = torch.softmax(z, -1)
    y = given["weight"].double()[:, None] * (p @ given["table"][: z.shape[1]].double())
    return torch.where(given["live"][:, None], y, 0.0)


@pytest.mark.parametrize(("t", "limit"), [("f32", 2e-6), ("bf16", 6e-3)])
@pytest.mark.parametrize(("V", "E", "more"), [(70, 33, 0), (129, 40, 5), (64, 32, 0), (3, 5, 0)])
def test_mixture(t: str, limit: float, V: int, E: int, more: int) -> None:
    given = drawn(t, 19, 24, V, E, more)
    given["bias"] = torch.randint(-2, 3, (V,)).to(TYPES[t])
    want = reference(given)
    got = mixed(t, given).double()
    assert torch.equal(got[~given["live"]], want[~given["live"]])
    assert (got - want).norm() <= limit * want.norm()


def test_a_tile_without_live_rows_is_zero() -> None:
    given = drawn("f32", 40, 8, 40, 20)
    given["live"][:] = False
    given["live"][35] = True
    got = mixed("f32", given)
    assert not got[:35].any() and not got[36:].any()
    assert torch.allclose(got.double(), reference(given), atol=1e-6)


def test_a_row_is_the_same_beside_any_others() -> None:
    given = drawn("f32", 37, 24, 70, 33)
    given["live"][:] = True
    whole = mixed("f32", given)
    alone = {n: v[20:21].clone() if n in ("x", "live", "weight") else v for n, v in given.items()}
    assert torch.equal(mixed("f32", alone)[0], whole[20])


def test_logits_that_are_no_numbers() -> None:
    """NaN is never mixed in; of infinite logits there is no mixture."""
    given = drawn("f32", 3, 8, 40, 20)
    given["live"][:] = True
    given["x"].zero_()
    given["bias"] = torch.randn(40)
    given["bias"][7] = torch.nan
    sound = {**given, "bias": torch.where(given["bias"].isnan(), -torch.inf, given["bias"])}
    assert torch.allclose(mixed("f32", given).double(), reference(sound), atol=1e-6)
    given["bias"][:] = -torch.inf
    assert not mixed("f32", given).any()
    given["bias"][3] = torch.inf
    assert not mixed("f32", given).any()
