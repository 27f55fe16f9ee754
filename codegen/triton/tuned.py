"""What `dcompile tune` found fastest on a GPU: tiles by architecture, family and shape.

tuned.json: {"sm_90": {"linear n6144 k2048 bf16": {"tiles": {"rows": 16, ...}, "us": 9.1, "default_us": 9.9,
"device": "...", "date": "..."}}}.  A shape that is not in it gets its default (`tiles.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from dcompile.codegen.triton.variant import TRITON_TYPES, Variant

TABLE = "tuned.json"
Table = Mapping[str, Mapping[str, Mapping[str, Any]]]

# kernel -> its family, and the constants that make its shape class with their names in a key
FAMILIES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "linear:linear": ("linear", {"n": "N", "k": "K"}),
    "linear:gated": ("gated", {"n": "N", "k": "K"}),
    "moe_ffn:gate_up": ("gate_up", {"n": "N", "k": "K", "e": "EXPERTS"}),
    "moe_ffn:down": ("down", {"n": "N", "k": "K", "e": "EXPERTS"}),
    "attend:attend": ("attend", {"h": "H", "g": "G", "d": "SIZE"}),
    "vocab_choice:choose_partly": ("vocab_choice", {"v": "V", "d": "D"}),
}
_SHORT = {long: short for short, long in TRITON_TYPES.items()}


@dataclass(frozen=True)
class Shape:
    """What tiles are chosen by: a family, its sizes, and the dtype of the weights."""

    family: str
    sizes: tuple[tuple[str, int], ...]
    dtype: str

    @property
    def key(self) -> str:
        words = [f"{name}{value}" for name, value in self.sizes]
        return " ".join([self.family, *words, self.dtype])


def shape_of(kernel: str, constants: Mapping[str, Any], types: Iterable[str]) -> Shape | None:
    """The shape class of a kernel ("module:function"); None where its tiles are not tuned.

    `types` are those of its arguments, results first.
    """
    module, _, function = kernel.partition(":")
    found = FAMILIES.get(f"{module.rpartition('.')[2]}:{function}")
    if found is None:
        return None
    family, names = found
    dtypes = [_SHORT[t[1:]] for t in types if t in ("*bf16", "*fp16", "*fp32")]
    # A product of halves may have a result or sums in float32; its operands are halves.
    dtype = next((d for d in dtypes if d != "f32"), "f32")
    return Shape(family, tuple((short, constants[long]) for short, long in names.items()), dtype)


def find(family: str, arch: int, dtype: str, **sizes: int) -> Mapping[str, int] | None:
    """The fields of the tiles that were fastest for a shape; None where it was not tuned."""
    shape = Shape(family, tuple(sizes.items()), dtype)
    entry = _table().get(f"sm_{arch}", {}).get(shape.key)
    return None if entry is None else entry["tiles"]


def recorded(variants: Iterable[Variant], arch: int) -> dict[str, Any]:
    """The entries of the table that a plan's kernels follow, to be kept beside them."""
    known, out = _table().get(f"sm_{arch}", {}), {}
    for variant in variants:
        types = [p.type for p in variant.arguments]
        shape = shape_of(variant.kernel, dict(variant.constants), types)
        if shape is not None and shape.key in known:
            out[shape.key] = dict(known[shape.key])
    return out


def path() -> Path:
    """The table that goes with this installation."""
    return Path(str(resources.files("dcompile.codegen.triton").joinpath(TABLE)))


def read(text: str) -> dict[str, dict[str, dict[str, Any]]]:
    """A table from its text; raises ValueError where it is none."""
    table = json.loads(text)
    for entries in table.values():
        for entry in entries.values():
            fields = entry["tiles"]
            if not all(type(v) is int and v > 0 for v in fields.values()):
                raise ValueError(f"no tiles: {fields}")
    return dict(table)


def written(table: Table) -> str:
    """The text of a table, the same for equal ones."""
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


@cache
def _table() -> Table:
    return read(path().read_text())
