"""A headless Chromium, for tests of pages; those that use it are skipped where there is none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The first is Debian's without a window, which starts faster.
_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's, started from the program that the machine has."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # Nothing of its own is to leave the machine; who is root has no sandbox.
        switches = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=program, args=switches)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def tab(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A new page of a browser that knows nobody; at its end, nothing must have been asked of elsewhere or gone wrong.

    Args:
        browser: Of `chromium`.
        url: What paths are relative to.
        **options: Of the context: `java_script_enabled`, `color_scheme`, `viewport`, ...
    """
    context = browser.new_context(base_url=url, **options)
    asked, wrong = [], []
    context.on("request", lambda request: asked.append(request.url))
    context.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    context.set_default_timeout(60_000)
    try:
        yield context.new_page()
        assert asked and all(one.startswith((f"{url}/", "data:")) for one in asked), asked
        assert not wrong, wrong
    finally:
        context.close()


def axe_script() -> str:
    """The accessibility engine axe-core, to be run in a page."""
    package = pytest.importorskip("axe_playwright_python", reason="needs the package axe-playwright-python")
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Any, options: str = "") -> list[tuple[str, list[str]]]:
    """What `axe_script`, which the page has run, finds wrong: name and places."""
    found = page.evaluate(f"axe.run({options})")
    assert found["passes"]
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]]
