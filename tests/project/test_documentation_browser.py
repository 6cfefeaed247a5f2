# SPDX-License-Identifier: Apache-2.0
"""The documentation site in a real browser: nothing fails, nothing is asked of other servers, nothing is cut off."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.project.site_tools import build

pytestmark = pytest.mark.browser

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("site")
    assert build(folder) == ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()


def _failed(asked: object) -> bool:
    """Whether a request failed by itself: going on to the next page ends what is still under way."""
    return "ERR_ABORTED" not in str(getattr(asked, "failure", ""))


@pytest.mark.parametrize("width", [1280, 420])
def test_pages_need_nothing_else_and_fit(address: tuple[str, Path], width: int) -> None:
    home, folder = address
    wrong: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *QUIET])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((home, "data:")) else None)
        page.on(
            "requestfailed", lambda asked: wrong.append(f"{asked.failure}: {asked.url}") if _failed(asked) else None
        )
        page.on("response", lambda got: wrong.append(f"{got.status}: {got.url}") if got.status >= 400 else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        names = [path.name for path in folder.glob("*.html") if path.name != "404.html"]
        assert len(names) > 20
        for name in names:
            page.goto(f"{home}/{name}", wait_until="networkidle")
            blank = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
            wrong += [f"{name}: no picture {source}" for source in page.evaluate(blank)]
            root = "document.documentElement"
            beyond = page.evaluate(f"{root}.scrollWidth - {root}.clientWidth")
            wrong += [f"{name} is {beyond} pixels too wide"] if beyond > 0 else []
        browser.close()
    assert wrong == []


def test_the_search_finds_a_name(address: tuple[str, Path]) -> None:
    home, _ = address
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *QUIET])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{home}/index.html", wait_until="networkidle")
        page.locator("[data-md-component=search-query]").click()
        page.keyboard.type("gaussian_blur")
        found = page.locator(".md-search-result__link").first
        found.wait_for(timeout=20_000)
        assert ".html" in (found.get_attribute("href") or "")
        browser.close()
