"""Arrows between folders, packaging, and a runtime that starts without the compiler."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {  # folder -> the parts of dcompile that it may name
    "dcompile/ir": {"ir", "errors"},
    "passes": {"passes", "ir", "errors"},
    "codegen": {"codegen", "ir", "errors", "cubin"},
    "runtime": {"runtime", "errors", "untrusted", "cubin"},
    "dcompile/frontends": {"frontends", "ir", "errors", "untrusted"},
    "dcompile/policies": {"policies", "errors"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names if node.module == "dcompile")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows(folder: str) -> None:
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        named = {name.split(".")[1] for name in imports(path) if name.startswith("dcompile.")}
        assert named <= MAY_IMPORT[folder], path


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = set()
    for top in ("dcompile", "passes", "codegen", "runtime"):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "dcompile" else ("dcompile", *parts)))
    assert listed == found


def test_the_runtime_loads_no_compiler() -> None:
    code = (
        "import sys, dcompile.runtime.decode.loop; "
        "print([m for m in sys.modules if m.startswith(('dcompile.passes', 'dcompile.codegen', "
        "'dcompile.frontends', 'dcompile.ir', 'dcompile.step.trace', 'transformers', 'torch._inductor'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_runtime_stays_small() -> None:
    lines = 0
    for path in (ROOT / "runtime").glob("*.py"):
        text = path.read_text().splitlines()
        lines += sum(bool(line.strip()) and not line.strip().startswith("#") for line in text)
    assert lines < 3000
