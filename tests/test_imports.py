"""A runtime is a runtime: what running an artifact must not load."""

from __future__ import annotations

import subprocess
import sys

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


def test_the_loop_loads_no_compiler() -> None:
    assert loaded("dcompile.runtime.decode.loop") == "['errors', 'runtime', 'untrusted'] [] True"


def test_the_command_line_loads_no_torch() -> None:
    parts = loaded("dcompile.cli")
    assert parts.startswith("['cli', 'errors', 'options'] ") and parts.endswith(" False")
