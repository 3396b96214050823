"""Debian's Chromium under Playwright: pages opened from files, and everything that they complain about."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESKTOP = (390, 844), (1280, 900)


@contextmanager
def browser() -> Iterator[Any]:
    """A running Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright in this environment")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


class Opened:
    """A page in a window of its own; `errors` is what it said to the console, threw, or tried to fetch."""

    def __init__(
        self, browser: Any, file: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light"
    ) -> None:
        self.errors: list[str] = []
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = context.new_page()
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url, file))
        self.page.goto(file.as_uri())

    def _asked(self, url: str, file: Path) -> None:
        if url != file.as_uri():
            self.errors.append(f"fetched {url}")

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())

    def wait_for_count(self, number: str) -> None:
        """Until the list has so many rows (a function to wait for would be eval, which the page forbids)."""
        self.page.locator("#count", has_text=re.compile(rf"^{number} of")).wait_for(timeout=5_000)

    def close(self) -> None:
        self.page.context.close()
