"""A headless Chromium for tests, or the reason why there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

TIMEOUT_MS = 120_000  # a busy machine is slow, not wrong


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is no Chromium or no playwright."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium: the pages are not tested in a browser (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'mpsearch[dev]'")
    with sync_api.sync_playwright() as playwright:
        # No sandbox: it cannot be had as root in a container, and only pages of our own are opened.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=TIMEOUT_MS)
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Any, **settings: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page, and the errors that appear on its console."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page, errors
    context.close()
