"""Draws the pictures of README and docs from a run that has been finalized: `python docs/pictures.py RUN`.

The report as a desktop and as a dark phone show it, and its figure of the front. It needs Chromium and playwright.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
TIMEOUT_MS = 300_000


def draw(run: Path) -> None:
    """Write `report.png`, `report-phone.png` and `digits-front.png` beside this file."""
    report = (run / "report.html").resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        desktop = browser.new_context(viewport={"width": 1280, "height": 1400}, color_scheme="light")
        desktop.set_default_timeout(TIMEOUT_MS)
        wide = desktop.new_page()
        wide.goto(report)
        wide.wait_for_selector("#figure-front .scatterlayer .point")
        wide.wait_for_selector("#figure-network .bars")
        wide.screenshot(path=HERE / "report.png")
        wide.locator("#figure-front").screenshot(path=HERE / "digits-front.png")
        pocket = browser.new_context(
            viewport={"width": 300, "height": 825}, color_scheme="dark", device_scale_factor=2, is_mobile=True
        )
        pocket.set_default_timeout(TIMEOUT_MS)
        phone = pocket.new_page()
        phone.goto(report)
        phone.wait_for_selector("#figure-front .scatterlayer .point")
        phone.screenshot(path=HERE / "report-phone.png")
        browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
