# SPDX-License-Identifier: Apache-2.0
"""The documentation site builds without a word, links to nothing that is not there, and documents every public name."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import segkern
import segkern.integrations.diffusers as adapter
from tests.project.site_tools import Page, build, pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

pytest.importorskip("mkdocs", reason="the site is built by mkdocs")

from docs.hooks import docstrings, repository_files  # noqa: E402


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert build(folder) == ""
    return folder


@pytest.fixture(scope="module")
def html(built: Path) -> dict[Path, Page]:
    return pages(built)


def test_every_link_and_anchor_is_there(built: Path, html: dict[Path, Page]) -> None:
    assert len(html) > 20
    missing = []
    for path, page in html.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchors = html[target].ids if target in html else set()
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors):
                missing.append(f"{path.name}: {link}")
    assert missing == []


def test_pages_load_nothing_from_elsewhere(built: Path, html: dict[Path, Page]) -> None:
    for path, page in html.items():
        assert page.loads
        for load in page.loads:
            parts = urlsplit(load)
            assert parts.scheme in ("", "data"), f"{path.name}: {load}"
            # Only the page for what is not there has addresses that begin at the root.
            where = built / parts.path.lstrip("/") if path.name == "404.html" else path.parent / parts.path
            assert parts.scheme == "data" or where.exists(), f"{path.name}: {load}"
    for style in built.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def documented(name: str) -> set[str]:
    return set(re.findall(r"^::: (\S+)$", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE))


def test_the_reference_has_every_public_name() -> None:
    names = {f"segkern.{name}" for name in segkern.__all__ if name != "__version__"}
    names |= {f"segkern.energy.{name}" for name in segkern.energy.__all__}
    of_reference = {f"segkern.reference.{name}" for name, value in vars(segkern.reference).items() if _is_own(value)}
    assert documented("api.md") == names | of_reference
    own = {f"{adapter.__name__}.{name}" for name in adapter.__all__}
    assert documented("api-diffusers.md") == own | {f"{adapter.__name__}.models.names.select_layers"}


def _is_own(value: object) -> bool:
    """Whether a public function is written in ``segkern.reference`` itself."""
    here = getattr(value, "__module__", None) == "segkern.reference"
    return here and callable(value) and not getattr(value, "__name__", "_").startswith("_")


def test_roles_of_docstrings_become_links(built: Path) -> None:
    text = (built / "api.html").read_text(encoding="utf-8") + (built / "api-diffusers.html").read_text(encoding="utf-8")
    assert not re.search(r":(func|class|mod|meth):", text)
    assert 'href="#segkern.gaussian_blur"' in text
    assert "&gt;&gt;&gt; " in text or 'class="gp"' in text, "examples are no examples"


@pytest.mark.parametrize("folder", ["pictures", "diagrams"])
def test_every_picture_is_shown(folder: str) -> None:
    shown = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    for picture in (DOCS / folder).iterdir():
        assert f"({folder}/{picture.name})" in shown
        assert picture.stat().st_size < 250_000


@pytest.mark.parametrize("module", [docstrings, repository_files], ids=lambda module: module.__name__)
def test_examples_of_the_tools_run(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0
    assert found.failed == 0


def test_a_link_to_a_file_that_is_not_there_is_an_error() -> None:
    class Missing:
        src_uri = "page.md"
        content_string = "[text](../no/such/file.py)"

    class Files(list):  # type: ignore[type-arg]
        def documentation_pages(self) -> list[Missing]:
            return [Missing()]

    with pytest.raises(repository_files.PluginError, match=r"page\.md links to \.\./no/such/file\.py"):
        repository_files.on_files(Files(), config={})
