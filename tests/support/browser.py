"""A headless Chromium, driven by selenium; skips, with the reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# What is wider than the page, but for what lies in one of the containers that are meant to scroll.
OVERFLOWING = """
const wide = document.documentElement.clientWidth;
const page = document.documentElement.scrollWidth > wide ? ['the page'] : [];
return page.concat([...document.body.querySelectorAll('*')].filter((e) => {
  const box = e.getBoundingClientRect(), held = e.parentElement.closest(arguments[0]);
  return box.width && (box.right > wide + 1 || box.left < -1) && !held;
}).map((e) => e.tagName + '.' + e.className + '#' + e.id));
"""
# Containers that a keyboard cannot reach, or whose right end cannot be scrolled into view.
UNREACHABLE = """
return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility()).filter((e) => {
  e.scrollLeft = 0;
  const start = e.scrollWidth - e.clientWidth;
  e.scrollLeft = e.scrollWidth;
  const cells = [...e.querySelectorAll('tr > :last-child')];
  const shown = cells.every((c) => c.getBoundingClientRect().right <= e.getBoundingClientRect().right + 1);
  const moved = Math.abs(e.scrollLeft - start) <= 1;
  e.scrollLeft = 0;
  return e.tabIndex !== 0 || getComputedStyle(e).overflowX !== 'auto' || !moved || !shown;
}).map((e) => e.tagName + '.' + e.className);
"""


@contextmanager
def browser(width: int, height: int, dark: bool) -> Iterator[Any]:
    """A driver whose page is `width` pixels wide and prefers light or dark."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(executable_path=driver)
    page = selenium.Chrome(options=options, service=service)
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        yield page
    finally:
        page.quit()
