"""The documents are true where a machine can tell: quoted lines, named files, links, line length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WALKTHROUGH = DOCS / "walkthrough.md"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
CHANGES = ROOT / "CHANGELOG.md"  # names files as they were called
WIDTH = 100
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
SOURCES = {"dcompile", "passes", "codegen", "runtime", "tests", "bench", "docs"}
# A file or a folder of the repository. <x>, *, {a,b} and NAME stand for several.
PATH = re.compile(r"(?!.*NAME)[\w.-]+(?:/[\w.-]+)+/?")


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text)


def relative(page: Path) -> Iterator[str]:
    """The targets of a page's links that are files beside it."""
    for target in LINK.findall(prose(page.read_text())):
        if not target.startswith(("http:", "https:", "#")):
            yield target.partition("#")[0]


def named(page: Path) -> Iterator[str]:
    """The paths of this repository that a page's prose names in code marks."""
    for code in CODE.findall(prose(page.read_text())):
        if PATH.fullmatch(code) and code.split("/")[0] in SOURCES:
            yield code


@pytest.mark.parametrize("page", [*PAGES, CHANGES], ids=lambda page: page.name)
def test_lines_fit(page: Path) -> None:
    """Tables and code may be wider, because breaking them makes them worse to read."""
    lines = prose(page.read_text()).splitlines()
    wide = [line for line in lines if len(line) > WIDTH and not line.startswith("|")]
    assert not wide, f"break them at a sentence: {wide}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = [target for target in relative(page) if not (page.parent / target).exists()]
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    gone = [path for path in named(page) if not (ROOT / path).exists()]
    assert not gone


def test_the_pages_are_watched() -> None:
    """The three tests above look at something."""
    assert sum(len(list(named(page))) for page in PAGES) > 100
    assert sum(len(list(relative(page))) for page in PAGES) > 40


def quotes() -> Iterator[tuple[str, list[Path], list[str]]]:
    """Each code block of the walkthrough: its kind, the files linked before it, and its lines."""
    text, at = WALKTHROUGH.read_text(), 0
    linked: list[Path] = []
    for fence in FENCE.finditer(text):
        found = [DOCS / target for target in LINK.findall(text[at : fence.start()])]
        linked += [path for path in found if "golden" in path.parts and path.is_file()]
        at = fence.end()
        yield fence[1], list(linked), fence[2].splitlines()


def test_every_quoted_line_is_in_the_file_it_is_quoted_from() -> None:
    """A difference is from the last but one file linked before it to the last one."""
    count = 0
    for kind, linked, lines in quotes():
        after = linked[-1].read_text().splitlines()
        if kind != "diff":
            assert not [line for line in lines if line not in after], linked[-1].name
            count += len(lines)
            continue
        before = linked[-2].read_text().splitlines()
        for line in lines:
            here, there = (before, after) if line[0] == "-" else (after, before)
            assert line[0] in "+-" and line[1:] in here, f"{linked[-1].name}: {line}"
            assert line[1:] not in there, f"{linked[-1].name} does not change: {line}"
            count += 1
    assert count > 60


def test_every_stage_is_read() -> None:
    """The walkthrough leaves no pass out, and reads them in their order."""
    stages = sorted((ROOT / "tests/golden/tiny_moe/stages").iterdir())
    linked = [Path(target).name for target in relative(WALKTHROUGH) if "/stages/" in target]
    assert list(dict.fromkeys(linked)) == [stage.name for stage in stages]
