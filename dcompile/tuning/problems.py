"""An operator of a plan as a problem of its own: its launches for any tiles, and random operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcompile.codegen.kernels import attend, linear, moe_ffn, vocab_choice
from dcompile.codegen.triton import tiles as configurations
from dcompile.codegen.triton import tuned
from dcompile.codegen.triton.tiles import Tiles
from dcompile.codegen.triton.tuned import Shape
from dcompile.codegen.triton.variant import Lowering

R, B = {"R": 1}, {"B": 1}
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """A shape class with what else its launches need."""

    shape: Shape
    more: tuple[tuple[str, int], ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        return {**dict(self.shape.sizes), **dict(self.more)}

    def default(self, arch: int) -> Tiles:
        """The tiles that it has now."""
        s, dtype = self.sizes, self.shape.dtype
        match self.shape.family:
            case "linear":
                return configurations.linear_tiles(s["n"], s["k"], dtype, arch)
            case "gated":
                return configurations.gated_tiles(s["n"], s["k"], dtype, arch)
            case "gate_up":
                return configurations.gate_up_tiles(s["n"], s["k"], s["e"], dtype, arch)
            case "down":
                return configurations.down_tiles(s["n"], s["k"], s["e"], dtype, arch)
            case "attend":
                return configurations.attend_tiles(32, s["h"], s["g"], s["d"], dtype, arch)
            case _:
                return configurations.vocab_tiles(s["v"], s["d"], dtype, arch)

    def lowering(self, arch: int, tiles: Tiles) -> Lowering:
        """The operator's launches over R rows (of B sequences) with these tiles."""
        s, dtype = self.sizes, self.shape.dtype
        kind: dict[str, Any] = {"dtype": dtype, "arch": arch}
        match self.shape.family:
            case "linear":
                return linear.launches(rows=R, n=s["n"], k=s["k"], tiles=tiles, **kind)
            case "gated":
                return linear.gated_launches(rows=R, n=s["n"], k=s["k"], tiles=tiles, **kind)
            case "gate_up":
                return self._experts(s["k"], s["n"], {**kind, "up_tiles": tiles})
            case "down":
                return self._experts(s["n"], s["k"], {**kind, "out_tiles": tiles})
            case "attend":
                heads: dict[str, Any] = {"heads": s["h"], "groups": s["g"], "size": s["d"]}
                how: dict[str, Any] = {"positions": s["positions"], "scale": s["d"] ** -0.5}
                return attend.launches(rows=R, tiles=tiles, **heads, **how, **kind)
            case _:
                sizes: dict[str, Any] = {"hidden": s["d"], "vocab": s["v"], "mask_id": s["v"] - 1}
                sizes["length"] = s["length"]
                return vocab_choice.launches(sequences=B, tiles=tiles, **sizes, **kind)

    def _experts(self, hidden: int, width: int, kind: dict[str, Any]) -> Lowering:
        s = self.sizes
        count: dict[str, Any] = {
            "num_experts": s["e"] - s["shared"],
            "top_k": s["top"],
            "shared": s["shared"],
        }
        return moe_ffn.launches(rows=R, hidden=hidden, width=width, **count, **kind)

    def symbols(self, rows: int) -> dict[str, int]:
        """R and B for about so many rows."""
        block = self.sizes.get("length", rows)
        return {"R": rows, "B": max(1, rows // block)}

    def operands(self, rows: int, where: str) -> dict[str, Tensor]:
        """Random operands on a torch device, scaled as a layer's; results are there to be written."""
        draw = _Draw(where, TORCH[self.shape.dtype])
        s, symbols = self.sizes, self.symbols(rows)
        match self.shape.family:
            case "linear" | "gated":
                parts = 2 if self.shape.family == "gated" else 1
                return {
                    "y": draw.empty(rows, s["n"]),
                    "x": draw.normal(rows, s["k"], scale=1.0),
                    "w": draw.normal(parts * s["n"], s["k"]),
                }
            case "gate_up":
                return draw.experts(rows, s["k"], s["n"], s)
            case "down":
                return draw.experts(rows, s["n"], s["k"], s)
            case "attend":
                return draw.attention(rows, s)
            case _:
                return draw.choice(symbols["B"], s)


class _Draw:
    """Random tensors on one device."""

    def __init__(self, where: str, dtype: torch.dtype) -> None:
        self.where, self.dtype = where, dtype
        self.generator = torch.Generator(where).manual_seed(0)

    def normal(self, *shape: int, scale: float | None = None) -> Tensor:
        out = torch.empty(shape, dtype=self.dtype, device=self.where)
        return out.normal_(0.0, scale or shape[-1] ** -0.5, generator=self.generator)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.where)

    def full(self, value: int, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.int64, device=self.where)

    def experts(
        self, rows: int, hidden: int, width: int, s: Mapping[str, int]
    ) -> dict[str, Tensor]:
        shape = (rows, s["e"] - s["shared"])
        scores = torch.rand(shape, generator=self.generator, device=self.where)
        weights, chosen = scores.topk(s["top"], -1)
        return {
            "y": self.empty(rows, hidden),
            "x": self.normal(rows, hidden, scale=1.0),
            "weights": (weights / weights.sum(-1, keepdim=True)).contiguous(),
            "experts": chosen.to(torch.int32),
            "gate_up": self.normal(s["e"], 2 * width, hidden),
            "down": self.normal(s["e"], hidden, width),
        }

    def attention(self, rows: int, s: Mapping[str, int]) -> dict[str, Tensor]:
        cache = (1, s["positions"], s["g"], s["d"])
        return {
            "o": self.empty(rows, s["h"], s["d"]),
            "q": self.normal(rows, s["h"], s["d"], scale=1.0),
            "keys": self.normal(*cache, scale=1.0),
            "values": self.normal(*cache, scale=1.0),
            "row_seq": self.full(0, rows),
            "row_limit": self.full(s["positions"], rows),
        }

    def choice(self, sequences: int, s: Mapping[str, int]) -> dict[str, Tensor]:
        shape = (sequences, s["length"])
        f32 = {"dtype": torch.float32}
        return {
            "token": self.full(0, *shape),
            **{name: self.empty(*shape, **f32) for name in ("confidence", "margin", "entropy")},
            "x": self.normal(*shape, s["d"], scale=1.0),
            "w": self.normal(s["v"], s["d"]),
            "live": torch.ones(shape, dtype=torch.bool, device=self.where),
            "temperature": self.empty(sequences, **f32),
            **{name: self.full(0, sequences) for name in ("seed", "tick")},
            "pos": torch.arange(s["length"], device=self.where).repeat(sequences, 1),
        }


def problems(kernels: Mapping[str, Any]) -> list[Problem]:
    """What can be tuned of an artifact's kernels, each shape once; float32 is a reference and stays."""
    entries = []
    for kernel in kernels.values():
        constants = dict(kernel["constants"])
        types = [argument["type"] for argument in kernel["arguments"]]
        shape = tuned.shape_of(kernel["kernel"], constants, types)
        if shape is not None and shape.dtype != "f32":
            entries.append((shape, constants))
    # How many experts a token has only the second of the experts' kernels says.
    top = {c["EXPERTS"]: c["TOP"] for shape, c in entries if shape.family == "down"}
    found: dict[Shape, Problem] = {}
    for shape, c in entries:
        more: dict[str, int] = {}
        if shape.family in ("gate_up", "down"):
            chosen = top[c["EXPERTS"]]
            more = {"top": chosen, "shared": c["CHOICES"] - chosen}
        elif shape.family == "attend":
            more = {"positions": c["L"]}
        elif shape.family == "vocab_choice":
            more = {"length": c["LENGTH"]}
        found.setdefault(shape, Problem(shape, tuple(more.items())))
    return list(found.values())
