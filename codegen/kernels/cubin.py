"""What a cubin says about its kernel, read from the ELF file itself: no vendor tool, no driver.

Sections: `.nv.info` (registers and stack by function), `.nv.info.KERNEL` (its parameters),
`.nv.shared.KERNEL` (static shared memory).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_REGISTERS, _FRAME, _PARAMETER = 0x2F, 0x11, 0x17
_NO_BITS = 8


@dataclass(frozen=True)
class CubinFacts:
    """Registers a thread, stack bytes a thread, static shared bytes, parameters (ordinal, offset, size)."""

    entry: str
    registers: int
    stack: int
    static_shared: int
    parameters: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Section:
    size: int
    data: bytes


def read_cubin(blob: bytes) -> CubinFacts:
    """The facts of the one kernel in a cubin."""
    sections = _sections(blob)
    (entry,) = [name[9:] for name in sections if name.startswith(".nv.info.")]
    symbols = _symbols(sections)
    by_function = {_REGISTERS: 0, _FRAME: 0}
    for attribute, value in _records(sections[".nv.info"].data):
        if attribute in by_function:
            index, number = struct.unpack("<II", value)
            if symbols[index] == entry:
                by_function[attribute] = number
    parameters = []
    for attribute, value in _records(sections[f".nv.info.{entry}"].data):
        if attribute == _PARAMETER:
            _, ordinal, offset, flags = struct.unpack("<IHHI", value)
            parameters.append((ordinal, offset, flags >> 18))
    shared = sections.get(f".nv.shared.{entry}")
    return CubinFacts(
        entry,
        by_function[_REGISTERS],
        by_function[_FRAME],
        shared.size if shared is not None else 0,
        tuple(sorted(parameters)),
    )


def _sections(blob: bytes) -> dict[str, _Section]:
    (offset,) = struct.unpack_from("<Q", blob, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", blob, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", blob, offset + i * size) for i in range(count)]
    names = blob[headers[names_at][4] :]
    found = {}
    for name, kind, _, _, start, length, *_ in headers:
        data = blob[start : start + length] if kind != _NO_BITS else b""
        found[_text(names, name)] = _Section(length, data)
    return found


def _symbols(sections: dict[str, _Section]) -> list[str]:
    table, names = sections[".symtab"].data, sections[".strtab"].data
    starts = (struct.unpack_from("<I", table, at)[0] for at in range(0, len(table), 24))
    return [_text(names, start) for start in starts]


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Records with a value of any length; those that hold a number in place say nothing of use here."""
    at = 0
    while at + 4 <= len(data):
        form, attribute, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:
            yield attribute, data[at : at + value]
            at += value
