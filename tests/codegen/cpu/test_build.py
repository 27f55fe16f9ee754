"""Shared objects: cached by content, the same bytes each time, errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcompile.codegen.cpu import build
from dcompile.errors import BuildError

SMALL = {
    "one.cpp": '#include "abi.h"\nDC_EXPORT void one(const Arg *a) { *ptr<double>(a[0]) = 1; }\n',
    "abi.h": build.library_headers()["abi.h"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dcompile"


def test_builds_each_variant_and_caches_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.build(SMALL)
    assert tuple(built) == build.isas()
    assert len(list(cache.iterdir())) == len(built)
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("not from the cache"))
    assert build.build(SMALL) == built


def test_the_bytes_do_not_depend_on_the_place(cache: Path) -> None:
    first = build.build(SMALL, ["base"])
    for file in cache.iterdir():
        file.unlink()
    assert build.build(SMALL, ["base"]) == first
    assert b"/tmp" not in first["base"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler(.|\n)*try .*install"):
        build.build(SMALL)


def test_a_refused_source_shows_the_diagnostics() -> None:
    with pytest.raises(BuildError, match=r"one\.cpp:1(.|\n)*where"):
        build.build({"one.cpp": "int x = nonsense;"}, ["base"])


def test_an_unknown_instruction_set() -> None:
    with pytest.raises(BuildError, match="sse9"):
        build.build(SMALL, ["sse9"])


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert build.build(SMALL, ["base"])["base"]


def test_runnable_takes_the_best_that_the_cpu_has() -> None:
    flags = [*build.ISA_FLAGS["avx2"], "sse"]
    assert build.runnable(flags) in (("avx2", "base"), ("base",))
    assert build.runnable([])[-1] == "base"


def test_amx_comes_before_the_others() -> None:
    flags = {flag for needed in build.ISA_FLAGS.values() for flag in needed}
    if "amx" in build.isas():
        assert build.runnable([*flags])[0] == "amx"
        assert build.runnable([*(flags - {"amx_tile"})])[0] == "avx512bf16"
