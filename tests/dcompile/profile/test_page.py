"""The page in a real browser: nothing fails, nothing overflows, tables sort, on desk and phone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import OVERFLOWING, UNREACHABLE, browser

from dcompile.cost.sources import source_of
from dcompile.errors import OptionError
from dcompile.profile import Capture
from dcompile.profile.page import page
from dcompile.profile.plots import pictures
from dcompile.profile.summary import Profile

SCROLLING = ".scroll, pre"
SHOWN = "return [...document.querySelectorAll('svg')].filter((e) => e.checkVisibility()).length"
COLUMN = """
const [table, at] = arguments;
return [...document.getElementById(table).tBodies[0].rows].map((r) => r.cells[at].innerText);
"""


@pytest.fixture(scope="module")
def html(captured: Capture, profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "profile.html"
    file.write_text(page(profile, captured.runner.artifact), encoding="utf-8")
    return file


def test_the_page_asks_nothing_of_the_network(html: Path) -> None:
    text = html.read_text()
    assert not re.findall(r"(?:src|href|url\()=?[\"'(]?\s*(?:https?:)?//", text)
    assert "@import" not in text and text.count("<script>") == 1
    assert len(text) < 2_000_000


def test_names_are_unique_and_colours_follow_the_page(html: Path) -> None:
    text = html.read_text()
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text)) <= set(names)
    assert not re.search(r"#0[0-9a][0-9]{2}0[0-9]", text.lower()), "a stand-in for a colour is left"


def test_the_same_profile_draws_the_same_pictures(html: Path, profile: Profile) -> None:
    text = html.read_text()
    for drawn in pictures(profile).values():
        assert drawn.wide in text and drawn.narrow in text


def test_every_kernel_of_ours_shows_its_source(captured: Capture, profile: Profile) -> None:
    for row in profile.kernels:
        source = source_of(captured.runner.artifact, row.name)
        assert source is not None and row.name.rpartition("_")[0] in source.text


def test_without_matplotlib_the_error_says_what_to_install(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"dcompile\[html\]"):
        pictures(profile)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_in_a_browser(html: Path, profile: Profile, width: int, dark: bool) -> None:
    with browser(width, 900, dark) as tab:
        tab.get(html.as_uri())
        assert tab.get_log("browser") == []
        tab.execute_script(
            "document.querySelectorAll('details').forEach((e) => { e.open = true; })"
        )
        assert tab.execute_script(OVERFLOWING, SCROLLING) == []
        assert tab.execute_script(UNREACHABLE, SCROLLING) == []
        scrolled = "return [...document.querySelectorAll('.scroll')].map((e) => e.scrollWidth > e.clientWidth)"
        assert any(tab.execute_script(scrolled)) == (width < 600), "only the phone scrolls a table"
        tall = "return Math.max(...[...document.querySelectorAll('tr')].map((e) => e.offsetHeight))"
        assert tab.execute_script(tall) < 80, "names are broken at a few places, not at each letter"
        assert tab.execute_script(SHOWN) == 5, "one of the two widths of each picture"
        background = tab.execute_script("return getComputedStyle(document.body).backgroundColor")
        red = int(re.findall(r"\d+", background)[0])
        assert red < 64 if dark else red > 192
        # Percentages sort as numbers, names as text, and a second click turns the order round.
        names = [row.name for row in profile.kernels]
        assert tab.execute_script(COLUMN, "kernels", 0) == names
        head = tab.find_elements("css selector", "#kernels thead button")
        tab.execute_script("arguments[0].click()", head[-1])
        shares = [float(text) for text in tab.execute_script(COLUMN, "kernels", 11)]
        assert shares == sorted(shares, reverse=True) and len(set(shares)) > 1
        tab.execute_script("arguments[0].click()", head[0])
        tab.execute_script("arguments[0].click()", head[0])
        assert sorted(names) == sorted(tab.execute_script(COLUMN, "kernels", 0))
        ordered = tab.execute_script(
            "return arguments[0].toSorted((a, b) => a.localeCompare(b))", names
        )
        assert tab.execute_script(COLUMN, "kernels", 0) == ordered
        assert tab.get_log("browser") == []
