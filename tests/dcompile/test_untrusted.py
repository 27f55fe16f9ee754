"""JSON of bounded cost, archives that have one reading."""

from __future__ import annotations

import io
import json
import random
import stat
import struct
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcompile.untrusted import is_safe, parse_json, stored_members


def archive(*members: tuple[str, bytes], large: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in members:
            with file.open(zipfile.ZipInfo(name), "w", force_zip64=large) as member:
                member.write(data)
    return out.getvalue()


def read(data: bytes) -> dict[str, bytes]:
    return {n: data[a:b] for n, (a, b) in stored_members(memoryview(data)).items()}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,3}(/[a-z]{1,4})?", fullmatch=True), st.binary()),
        unique_by=lambda item: item[0],
    ),
    st.booleans(),
)
def test_reads_what_the_library_writes(members: list[tuple[str, bytes]], large: bool) -> None:
    assert read(archive(*members, large=large)) == dict(members)


def test_a_damaged_archive_is_refused_or_the_same() -> None:
    """What stored bytes say is for a hash to hold; the names and their places are held here."""
    whole = archive(("a", b"x" * 40), ("b/c", b"y" * 9))
    random.seed(0)
    for _ in range(3000):
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        try:
            found = read(bytes(damaged))
        except ValueError:
            continue
        assert {name: len(data) for name, data in found.items()} == {"a": 40, "b/c": 9}


@pytest.mark.parametrize("name", ["../a", "/a", "a/../b", "a//b", "a/", "C:a", "a\\b", "a\nb", ""])
def test_names_stay_inside(name: str) -> None:
    assert not is_safe(name)
    with pytest.raises(ValueError, match=r"leaves|begin|damaged|another name"):
        read(archive((name, b"x")))


def test_links_are_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        link = zipfile.ZipInfo("a")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="a link"):
        read(out.getvalue())


def test_members_do_not_overlap() -> None:
    whole = bytearray(archive(("a", b"x" * 200), ("b", b"y" * 9)))
    at = whole.rindex(b"PK\1\2")
    inside = archive(("b", b"y" * 9))
    whole[40 : 40 + len(inside) - 60] = inside[: len(inside) - 60]
    struct.pack_into("<L", whole, at + 42, 40)
    with pytest.raises(ValueError, match="over each other"):
        read(bytes(whole))


def test_more_members_than_bytes() -> None:
    whole = bytearray(archive(("a", b"x")))
    struct.pack_into("<2H", whole, len(whole) - 14, 65535, 65535)
    with pytest.raises(ValueError, match="not where its end says"):
        read(bytes(whole))


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b"[" + b"{}," * 9_000_000 + b"{}]", b" " * (33 << 20), b"[\xff]", b"{"]
)
def test_costly_or_broken_json_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("unit", ["[]", "{}", '{"a":1}', '{"a":"b"}', "1.5", '"\u20ac"', "[[1]]"])
def test_json_costs_no_more_than_estimated(unit: str) -> None:
    text = ("[" + ",".join([unit] * 100_000) + "]").encode()
    wanted = json.loads(text)
    tracemalloc.start()
    assert parse_json(text) == wanted
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    estimate = text.count(b"{") * 240 + text.count(b"[") * 72 + text.count(b",") * 100
    assert peak < estimate + 8 * len(text)
