# SPDX-License-Identifier: Apache-2.0
"""The documentation site builds without warnings, documents every public name, and works in a browser."""

from __future__ import annotations

import doctest
import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import segkern
import segkern.integrations.diffusers as adapter
from tests.cli.browser_tools import chromium

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

pytest.importorskip("mkdocs", reason="the site is built by mkdocs")

from docs.hooks import docstrings, repository_files  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site like ``make docs`` and return its folder; a dead link or anchor is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


@pytest.mark.slow
def test_roles_of_docstrings_become_links(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    assert not re.search(r":(func|class|mod|meth):", text)
    assert 'href="#segkern.gaussian_blur"' in text
    assert "&gt;&gt;&gt; " in text or 'class="gp"' in text, "examples are not formatted as examples"


def documented(name: str) -> set[str]:
    return set(re.findall(r"^::: (\S+)$", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE))


def test_the_reference_has_every_public_name() -> None:
    names = {f"segkern.{name}" for name in segkern.__all__ if name != "__version__"}
    names |= {f"segkern.energy.{name}" for name in segkern.energy.__all__}
    of_reference = {f"segkern.reference.{name}" for name, value in vars(segkern.reference).items() if _is_own(value)}
    own = {f"{adapter.__name__}.{name}" for name in adapter.__all__}
    own.add("segkern.integrations.specs.layer_names.select_layers")
    own |= {f"segkern.generation.engine.{name}" for name in ("generate_images", "Job", "Outcome")}
    own |= {f"segkern.generation.drawing.{name}" for name in ("ImageRequest", "ImageResult")}
    assert documented("api.md") == names | of_reference | own


def _is_own(value: object) -> bool:
    """Return True for a public function that ``segkern.reference`` defines."""
    here = getattr(value, "__module__", None) == "segkern.reference"
    return here and callable(value) and not getattr(value, "__name__", "_").startswith("_")


@pytest.mark.parametrize("folder", ["pictures", "diagrams"])
def test_every_picture_is_shown(folder: str) -> None:
    shown = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    for picture in (DOCS / folder).iterdir():
        assert f"({folder}/{picture.name})" in shown
        assert picture.stat().st_size < 250_000


@pytest.mark.parametrize("module", [docstrings, repository_files], ids=lambda module: module.__name__)
def test_examples_of_the_hooks_run(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_a_link_to_a_file_that_is_not_there_is_an_error() -> None:
    class Missing:
        src_uri = "page.md"
        content_string = "[text](../no/such/file.py)"

    class Files(list[Any]):
        def documentation_pages(self) -> list[Missing]:
            return [Missing()]

    with pytest.raises(repository_files.PluginError, match=r"page\.md links to \.\./no/such/file\.py"):
        repository_files.on_files(Files(), config={})


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 420])
def test_pages_need_nothing_else_and_fit(site: Path, address: str, width: int) -> None:
    wrong: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda got: got.url.startswith((address, "data:")) or wrong.append(got.url))
        # Opening the next page aborts pending requests.
        page.on("requestfailed", lambda got: "ERR_ABORTED" in str(got.failure) or wrong.append(f"failed: {got.url}"))
        page.on("response", lambda got: got.status < 400 or wrong.append(f"{got.status}: {got.url}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        names = [path.name for path in site.glob("*.html") if path.name != "404.html"]
        assert sorted(names) == sorted(f"{path.stem}.html" for path in DOCS.glob("*.md"))
        for name in names:
            page.goto(f"{address}/{name}", wait_until="networkidle")
            blank = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
            wrong += [f"{name}: no picture {source}" for source in page.evaluate(blank)]
            beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            wrong += [f"{name} is {beyond} pixels too wide"] if beyond > 0 else []
    assert wrong == []


@pytest.mark.browser
@pytest.mark.parametrize("served", [True, False], ids=["served", "opened as files"])
def test_the_search_finds_a_name(served: bool, site: Path, address: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{address if served else site.as_uri()}/index.html", wait_until="networkidle")
        page.locator("[data-md-component=search-query]").click()
        page.keyboard.type("gaussian_blur")
        first = page.locator(".md-search-result__link").first
        first.wait_for(timeout=20_000)
        assert ".html" in (first.get_attribute("href") or "")
