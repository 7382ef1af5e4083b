"""The Chromium of this system, without a window; for tests of pages as people use them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.waiting import WAIT_SECONDS

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_MILLISECONDS = 1000 * WAIT_SECONDS


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where there is none."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium here ({', '.join(NAMES)}): apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(Path(path)),
            args=["--no-sandbox"],
            chromium_sandbox=False,
            timeout=WAIT_MILLISECONDS,
        )
        expect.set_options(timeout=WAIT_MILLISECONDS)
        try:
            yield browser
        finally:
            browser.close()


def serious_findings(page: Page) -> list[str]:
    """What axe holds against a page, of its two worst kinds."""
    found = Axe().run(page).response["violations"]
    return [
        f"{finding['id']}: {node['html'][:120]}"
        for finding in found
        if finding["impact"] in ("serious", "critical")
        for node in finding["nodes"]
    ]
