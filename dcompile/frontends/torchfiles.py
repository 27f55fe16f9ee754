"""Files of torch.save, looked at before torch reads them."""

from __future__ import annotations

import io
import mmap
import pickle
from pathlib import Path

import torch

from dcompile.untrusted import stored_members

MOST_PICKLE = 6 << 20
"""Bytes of a pickle beside its tensors: some forty thousand tensors have names and shapes in it."""


class Refused(ValueError):
    """A file holds what torch would have to run or to inflate."""


def map_file(path: Path) -> memoryview:
    """The bytes of a file, not read before they are asked for."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def load_plain(source: Path | bytes) -> object:
    """What torch.save stored, where that is numbers, text, containers and tensors.

    Tensors of a file stay mapped. Raises Refused for pickled objects of other kinds, ValueError for what is no
    such file, or an archive whose members are compressed, twice there, or lie over each other.
    """
    data = memoryview(source) if isinstance(source, bytes) else map_file(source)
    try:
        members = stored_members(data)
    except ValueError as error:
        raise ValueError(f"cannot be read as a file of torch.save: {error}") from None
    for name, (begin, end) in members.items():
        if name.endswith(".pkl") and end - begin > MOST_PICKLE:
            raise Refused(f"{name} has {end - begin} bytes of pickled objects, most {MOST_PICKLE}")
    whole: io.BytesIO | Path = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return torch.load(
            whole, map_location="cpu", weights_only=True, mmap=True if whole is source else None
        )
    except pickle.UnpicklingError as error:
        what = f"holds pickled Python objects, which are not loaded: {first_line(error)}"
        raise Refused(what) from None
    except Exception as error:  # a damaged file can make the unpickler fail in any way
        raise ValueError(f"cannot be read as a file of torch.save: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
