"""Chromium as Debian packages it, driven by Playwright, and pages whose every complaint is kept."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

PATIENCE_MS = 60_000  # says nothing of how fast the page is
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips where there is none."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("Chromium is not here: apt-get install chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        # tests may run as root, in a container that has no sandbox to give
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Shown:
    """A page, and what the browser complained of: exceptions, violated policies, requests that failed."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    asked_for: tuple[str, ...] = ()  # how complaints begin that the test has caused, the last of which may still come

    def refusals(self, *statuses: int) -> None:
        """Take away what the browser says of answers with these statuses, which the test asked for."""
        told = [f"Failed to load resource: the server responded with a status of {status} " for status in statuses]
        assert all(any(line.startswith(each) for line in self.complaints) for each in told), self.complaints
        self.complaints = [line for line in self.complaints if not line.startswith(tuple(told))]
        self.asked_for = (*self.asked_for, *told)


@contextmanager
def opened(browser: Browser, **context: Any) -> Iterator[Shown]:
    """An empty page in a context of its own. Fails if the browser complains of anything, or was given a cookie."""
    inner = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    inner.set_default_timeout(PATIENCE_MS)
    page = inner.new_page()
    shown = Shown(page)

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(shown.asked_for):
            shown.complaints.append(message.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: shown.complaints.append(str(error)))
    try:
        yield shown
        assert inner.cookies() == []
    finally:
        inner.close()
    assert not shown.complaints, shown.complaints
