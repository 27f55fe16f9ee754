"""A runtime is a runtime: what running an artifact must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parents[1] / "runtime"

LOADED = """
import sys
import {module}
parts = {{name.split(".")[1] for name in sys.modules if name.startswith("dcompile.")}}
others = {{"typer", "rich", "transformers", "tokenizers", "jinja2"}} & set(sys.modules)
print(sorted(parts), sorted(others), "torch" in sys.modules)
"""


def loaded(module: str) -> str:
    command = [sys.executable, "-c", LOADED.format(module=module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_loop_loads_no_compiler_and_no_torch() -> None:
    assert loaded("dcompile.runtime.decode.loop") == "['errors', 'runtime', 'untrusted'] [] False"


def test_the_command_line_loads_no_torch() -> None:
    parts = loaded("dcompile.cli")
    assert parts.startswith("['cli', 'errors', 'options'] ") and parts.endswith(" False")


def test_two_files_of_the_runtime_name_torch() -> None:
    """What converts tensors, and what launches torch's own operators."""
    named = set()
    for path in RUNTIME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] == "torch" for name in names):
                named.add(str(path.relative_to(RUNTIME)))
    assert named == {"tensors.py", "cpu/aten.py"}


VERBS = [
    *("cli", "options", "cost.launches", "cost.machine", "explain.command", "explain.graph"),
    *("profile.command", "profile.page", "runtime.opening", "runtime.cpu.executor"),
    *("runtime.cuda.executor", "runtime.writing", "decoding.calibrate", "decoding.scoring"),
]


@pytest.mark.parametrize("module", VERBS)
def test_what_runs_and_shows_artifacts_imports_no_torch(module: str) -> None:
    assert loaded(f"dcompile.{module}").endswith(" False")
