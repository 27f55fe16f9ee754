"""A headless Chromium, driven by selenium; skips, with the reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# What may not be wider than the page, but for what scrolls by itself.
OVERFLOWING = """
const wide = document.documentElement.clientWidth;
const scroll = (e) => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
const scrolls = (e) => e && (scroll(e) || scrolls(e.parentElement));
return [...document.body.querySelectorAll('*')].filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > wide + 1 || box.left < -1) && !scrolls(e.parentElement);
}).map((e) => e.tagName + '.' + e.className + '#' + e.id);
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
