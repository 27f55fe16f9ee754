"""What a cubin says of its kernel, read from the ELF file itself, which may be damaged.

Sections: `.nv.info` (registers and stack by function), `.nv.info.KERNEL` (its parameters),
`.nv.shared.KERNEL` (static shared memory).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_REGISTERS, _FRAME, _PARAMETER = 0x2F, 0x11, 0x17
_NO_BITS = 8
_LIMIT = 4096  # sections or symbols of an honest file


@dataclass(frozen=True)
class CubinFacts:
    """Registers and stack bytes a thread, static shared bytes, parameters (ordinal, offset, size)."""

    entry: str
    arch: int
    """The architecture it runs on: 90, 120."""
    registers: int
    stack: int
    static_shared: int
    parameters: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Section:
    size: int
    data: bytes


def read_cubin(blob: bytes) -> CubinFacts:
    """The facts of the one kernel in a cubin; raises ValueError where it is none."""
    try:
        return _read(blob)
    except (struct.error, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"no cubin of one kernel ({error!r})") from error


def _read(blob: bytes) -> CubinFacts:
    if blob[:5] != b"\x7fELF\x02":
        raise ValueError("it is no 64-bit ELF file")
    sections = _sections(blob)
    entries = [name[9:] for name in sections if name.startswith(".nv.info.")]
    if len(entries) != 1:
        raise ValueError(f"it holds {len(entries)} kernels, not one")
    (entry,) = entries
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
        _architecture(blob),
        by_function[_REGISTERS],
        by_function[_FRAME],
        shared.size if shared is not None else 0,
        tuple(sorted(parameters)),
    )


def _architecture(blob: bytes) -> int:
    """From the header's flags: in the low byte, or a byte higher since version 8 of the format."""
    (flags,) = struct.unpack_from("<I", blob, 0x30)
    return int((flags >> 8 if blob[8] >= 8 else flags) & 0xFF)


def _sections(blob: bytes) -> dict[str, _Section]:
    (offset,) = struct.unpack_from("<Q", blob, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", blob, 0x3A)
    if count > _LIMIT:
        raise ValueError(f"it has {count} sections")
    headers = [struct.unpack_from("<IIQQQQIIQQ", blob, offset + i * size) for i in range(count)]
    names = blob[headers[names_at][4] :]
    found = {}
    for name, kind, _, _, start, length, *_ in headers:
        if kind != _NO_BITS and start + length > len(blob):
            raise ValueError("a section ends outside the file")
        data = blob[start : start + length] if kind != _NO_BITS else b""
        found[_text(names, name)] = _Section(length, data)
    return found


def _symbols(sections: dict[str, _Section]) -> list[str]:
    table, names = sections[".symtab"].data, sections[".strtab"].data
    if len(table) > 24 * _LIMIT:
        raise ValueError("it has too many symbols")
    starts = (struct.unpack_from("<I", table, at)[0] for at in range(0, len(table), 24))
    return [_text(names, start) for start in starts]


def _text(data: bytes, start: int) -> str:
    end = data.find(b"\0", start)
    if end < 0:
        raise ValueError("a name has no end")
    return data[start:end].decode()


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Records with a value of any length; those that hold a number in place say nothing of use here."""
    at = 0
    while at + 4 <= len(data):
        form, attribute, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:
            yield attribute, data[at : at + value]
            at += value
