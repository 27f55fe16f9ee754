"""One thing, one name: what is tested is found by the name of its test, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcompile.cli import app as command_line
from dcompile.driver import pipeline
from dcompile.ir.program import Pass

TESTS = Path(__file__).parent
ROOT = TESTS.parent

PASSES = sorted(
    (item for item in vars(pipeline).values() if item is not Pass and hasattr(item, "exactness")),
    key=lambda item: item.__name__,
)
# Whole compiles, references, scripts, and kernels, whose sources are no Python modules here.
WHOLES = {"whole", "reference", "bench", "codegen/cpu/kernels", "codegen/kernels/interpreted"}
# Whose tests are called as the commands that a user types.
COMMANDS = "dcompile/cli"
FOLDERS = sorted(
    {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    - WHOLES
    - {"."}
)


def test_the_pipeline_has_passes() -> None:
    assert len(PASSES) >= 13


@pytest.mark.parametrize("item", PASSES, ids=lambda item: item.__name__)
def test_a_pass_has_one_name_and_a_test(item: type) -> None:
    """The module, the name in the pipeline and in dumps, and the test file are called alike."""
    name = item.__module__.rpartition(".")[2]
    assert pipeline.name_of(object.__new__(item)) == name
    assert (ROOT / "passes" / f"{name}.py").is_file()
    assert (TESTS / "passes" / f"test_{name}.py").is_file()


def command_names() -> set[str]:
    return {c.name or c.callback.__name__ for c in command_line.registered_commands if c.callback}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_test_is_called_as_what_it_tests(folder: str) -> None:
    """`test_MODULE[_WHAT].py` beside the module's path, or `test_FOLDER.py` for a folder's whole."""
    sources = [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*/__init__.py")]
    modules = {path.parent.name if path.stem == "__init__" else path.stem for path in sources}
    if folder == COMMANDS:
        modules |= {*command_names(), "process", "help"}
    assert len(modules) > 1, f"{folder} has no sources"
    for path in (TESTS / folder).glob("test_*.py"):
        name = path.stem.removeprefix("test_")
        assert any(name == m or name.startswith(f"{m}_") for m in modules), path
