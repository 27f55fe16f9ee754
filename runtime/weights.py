"""Arrays as bytes: the safetensors layout, written so that a tensor can be used where mapped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from dcompile.errors import ArtifactError
from dcompile.untrusted import MOST_HEADER, parse_json

ALIGN = 64
SHARD_BYTES = 64 << 20
"""A shard is closed once it holds this much; what is larger has a shard of its own."""

Array = npt.NDArray[Any]
LONG: Mapping[str, str] = {
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
}
"""numpy's and torch's names of types by the plan's; those in capitals are safetensors'."""
_SHORT = {long: short for short, long in LONG.items()}


class _Types(Mapping[str, np.dtype[Any]]):
    """numpy's types by the plan's names."""

    def __getitem__(self, name: str) -> np.dtype[Any]:
        return _type(LONG[name])

    def __iter__(self) -> Iterator[str]:
        return iter(LONG)

    def __len__(self) -> int:
        return len(LONG)


@cache
def _type(long: str) -> np.dtype[Any]:
    if long == "bfloat16":
        # Only for who has one: some versions take half a second to load.
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(long)


DTYPES = _Types()
_PAD = ".pad."


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: in which file, and from which byte of it."""

    file: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    bytes: int


def raw(array: Array) -> memoryview:
    """The bytes of an array, in place where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def shards(tensors: Iterable[tuple[str, Array]]) -> Iterator[list[memoryview]]:
    """Group tensors into files of the safetensors format, each as the pieces to write in order.

    Holds less than `SHARD_BYTES` and one tensor at a time; never asks for the next tensor before
    the shard of the one before it was taken, if that was large.
    """
    pending: list[tuple[str, Array]] = []
    held = 0
    for name, tensor in tensors:
        size = tensor.nbytes
        if pending and held + size > SHARD_BYTES:
            yield _shard(pending)
            pending, held = [], 0
        pending.append((name, tensor))
        held += size
        del tensor
        if held >= SHARD_BYTES:
            yield _shard(pending)
            pending, held = [], 0
    if pending:
        yield _shard(pending)


def _shard(tensors: list[tuple[str, Array]]) -> list[memoryview]:
    header: dict[str, object] = {}
    pieces: list[memoryview] = []
    end = 0

    def add(name: str, dtype: str, shape: list[int], data: memoryview) -> None:
        nonlocal end
        offsets = [end, end + data.nbytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        pieces.append(data)
        end += data.nbytes

    for name, tensor in tensors:
        add(name, _SHORT[tensor.dtype.name].upper(), list(tensor.shape), raw(tensor))
        # The format allows no holes, so what aligns the next tensor is a tensor too.
        if gap := -end % ALIGN:
            add(f"{_PAD}{len(header)}", "U8", [gap], memoryview(bytes(gap)))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return [memoryview(len(text).to_bytes(8, "little") + text), *pieces]


def entries(data: memoryview, file: str) -> Iterator[tuple[str, Entry]]:
    """The tensors of one shard, checked to lie inside it."""

    def broken(why: str) -> ArtifactError:
        return ArtifactError(why, where=file, remedy="compile the model again")

    length = int.from_bytes(data[:8], "little")
    if data.nbytes < 8 or length > data.nbytes - 8:
        raise broken("a weight file is shorter than its header says")
    try:
        header = parse_json(data[8 : 8 + length], MOST_HEADER)
        header.pop("__metadata__", None)
        for name, item in header.items():
            if name.startswith(_PAD):
                continue
            dtype, shape = DTYPES[item["dtype"].lower()], tuple(item["shape"])
            start, end = item["data_offsets"]
            size = prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or start < 0 or end - start != size:
                raise broken(f"tensor {name!r} has offsets that do not match its shape")
            if 8 + length + end > data.nbytes:
                raise broken(f"tensor {name!r} ends outside its file")
            yield name, Entry(file, dtype, shape, 8 + length + start, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken("a weight file's header cannot be read") from error


def mapped(data: memoryview, entry: Entry) -> Array:
    """The tensor over the mapped bytes themselves; it must not be written to."""
    flat = np.frombuffer(data[entry.start : entry.start + entry.bytes], dtype=np.uint8)
    return flat.view(entry.dtype).reshape(entry.shape)
