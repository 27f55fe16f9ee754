"""Files that somebody else wrote: JSON of bounded cost, zip archives of stored members.

Everything here raises ValueError with the reason; who calls names the file and the remedy.
"""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from typing import Any

MOST_JSON = 32 << 20
"""Bytes of one JSON text."""
MOST_HEADER = 16 << 20
"""Bytes of the header of a safetensors file."""
_MOST_PARSED = 384 << 20
# What CPython 3.11 to 3.13 need at most for what each character announces, keys and numbers included.
_COSTS = {b"{": 240, b"[": 72, b",": 100}

_END, _END64, _LOCATOR, _ENTRY, _LOCAL = 22, 56, 20, 46, 30
_ENCRYPTED, _UTF8 = 1, 1 << 11
_ALL_ONES = 0xFFFFFFFF


def parse_json(data: bytes | memoryview, most: int = MOST_JSON) -> Any:
    """The value of a JSON text, unless the text, or what it would become in memory, is too large."""
    size = memoryview(data).nbytes
    if size > most:
        raise ValueError(f"{size} bytes of JSON are more than the {most} that are read")
    text = bytes(data)
    if sum(text.count(sign) * cost for sign, cost in _COSTS.items()) > _MOST_PARSED:
        raise ValueError("this JSON would become too large in memory")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("this JSON is nested too deeply") from None


def is_safe(name: str) -> bool:
    """Whether a name stays inside the folder that it is relative to, on any system."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return False
    return name.isprintable() and not set(name) & set("\\:")


def stored_members(data: memoryview) -> dict[str, tuple[int, int]]:
    """Where each member of a zip archive begins and ends: for archives of stored members only.

    Stricter than the format, so that no other reader can see another archive in the same bytes: no
    comment, nothing between directory and end, no compression, no encryption, no link; names are safe, the same
    in both places, and different even where case is not; members lie in the file and not over each other.
    """
    start, size, count = _directory(data)
    spans: dict[str, tuple[int, int]] = {}
    folded: set[str] = set()
    regions: list[tuple[int, int, str]] = []
    at, end = start, start + size
    for _ in range(count):
        if at + _ENTRY > end or bytes(data[at : at + 4]) != b"PK\1\2":
            raise ValueError("the directory of the archive is damaged")
        name, first, span, at = _entry(data, at, start)
        if name.casefold() in folded:
            raise ValueError(f"the member {name!r} is there twice")
        folded.add(name.casefold())
        spans[name] = span
        regions.append((first, span[1], name))
    if at != end:
        raise ValueError("the directory of the archive has more bytes than members")
    regions.sort()
    for (_, ends, before), (begins, _, after) in pairwise(regions):
        if begins < ends:
            raise ValueError(f"the members {before!r} and {after!r} lie over each other")
    return spans


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Where the directory begins, its bytes, and how many members it lists."""
    total = data.nbytes
    if total < _END or bytes(data[total - _END : total - _END + 4]) != b"PK\5\6":
        raise ValueError("the archive is truncated: its end is not there")
    disk, first, here, count, size, start, comment = struct.unpack(
        "<4H2LH", data[total - _END + 4 : total]
    )
    end = total - _END
    locator = total - _END - _LOCATOR
    if locator >= _END64 and bytes(data[locator : locator + 4]) == b"PK\6\7":
        where, disks = struct.unpack("<QL", data[locator + 8 : locator + 20])
        if where != locator - _END64 or bytes(data[where : where + 4]) != b"PK\6\6" or disks > 1:
            raise ValueError("the directory's large end is damaged")
        disk, first, here, count, size, start = struct.unpack(
            "<2L4Q", data[where + 16 : where + _END64]
        )
        end = where
    if disk or first or comment or here != count:
        raise ValueError("the archive has a comment, or several parts")
    if start + size != end or count * _ENTRY > size:
        raise ValueError("the directory of the archive is not where its end says")
    return start, size, count


def _entry(data: memoryview, at: int, directory: int) -> tuple[str, int, tuple[int, int], int]:
    """A member's name, where its header and where its bytes lie, and the next entry's place."""
    flags, method = struct.unpack("<2H", data[at + 8 : at + 12])
    packed, size, name_size, extra_size, comment, disk = struct.unpack(
        "<2L4H", data[at + 20 : at + 36]
    )
    mode, first = struct.unpack("<2L", data[at + 38 : at + 46])
    raw = bytes(data[at + _ENTRY : at + _ENTRY + name_size])
    extra = data[at + _ENTRY + name_size : at + _ENTRY + name_size + extra_size]
    if _ALL_ONES in (packed, size, first):
        size, packed, first = _large(extra, size, packed, first)
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        raise ValueError("a member has a name that is no text") from None
    if not is_safe(name):
        raise ValueError(f"a member's name leaves the archive: {name!r}")
    if mode >> 16 & 0o170000 not in (0, 0o100000):
        raise ValueError(f"the member {name!r} is a link or no plain file")
    if method or packed != size:
        raise ValueError(f"the member {name!r} is compressed; only stored ones are read")
    if flags & _ENCRYPTED or disk:
        raise ValueError(f"the member {name!r} is encrypted, or in another part")
    local = bytes(data[first : first + _LOCAL]) if first + _LOCAL <= directory else b""
    if local[:4] != b"PK\3\4" or local[8:10] != b"\0\0":
        raise ValueError(f"the member {name!r} does not begin where the directory says")
    named, extended = struct.unpack("<2H", local[26:30])
    begin = first + _LOCAL + named + extended
    if bytes(data[first + _LOCAL : first + _LOCAL + named]) != raw:
        raise ValueError(f"the member {name!r} has another name at its own place")
    if begin + size > directory:
        raise ValueError(f"the member {name!r} ends outside the archive")
    return name, first, (begin, begin + size), at + _ENTRY + name_size + extra_size + comment


def _large(extra: memoryview, size: int, packed: int, first: int) -> tuple[int, int, int]:
    """The three numbers with those that need 64 bits read from the extra field."""
    at = 0
    while at + 4 <= extra.nbytes:
        kind, length = struct.unpack("<2H", extra[at : at + 4])
        if kind == 1 and at + 4 + length <= extra.nbytes:
            numbers = iter(
                struct.unpack(f"<{length // 8}Q", extra[at + 4 : at + 4 + length // 8 * 8])
            )
            try:
                return tuple(next(numbers) if n == _ALL_ONES else n for n in (size, packed, first))  # type: ignore[return-value]
            except RuntimeError:
                break
        at += 4 + length
    raise ValueError("the archive's sizes cannot be read")
