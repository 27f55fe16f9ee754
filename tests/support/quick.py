"""Compiling for tests: native code for this machine's best instruction set only, a quarter of the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcompile.codegen.cpu import build
from dcompile.driver import compile as driver
from dcompile.options import Options


@contextmanager
def one_instruction_set() -> Iterator[None]:
    """Within it, compilations build for one instruction set: the best that this machine runs."""
    best = build.runnable(_flags())[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "ISA_FLAGS", {best: build.ISA_FLAGS[best]})
        yield


def compile_quickly(folder: Path, options: Options, out: Path) -> Path:
    """As `compile_checkpoint`; the artifact runs on this kind of machine only."""
    with one_instruction_set():
        return driver.compile_checkpoint(folder, options, out)


def _flags() -> tuple[str, ...]:
    text = Path("/proc/cpuinfo").read_text()
    return next(
        (
            tuple(line.split(":")[1].split())
            for line in text.splitlines()
            if line.startswith("flags")
        ),
        (),
    )
