# SPDX-License-Identifier: Apache-2.0
"""A release: one version everywhere, valid issue forms, and pages that name existing files and targets."""

from __future__ import annotations

import datetime
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import segkern
from tests.project.set_version import PLACES, VERSION, release

ROOT = Path(__file__).parents[2]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


def versions(root: Path) -> dict[str, str]:
    """Return the version in each file."""
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(r"^## (\S+) - (unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    source = re.search(r'__version__ = "(.*)"', (root / "segkern" / "version.py").read_text(encoding="utf-8"))
    assert heading is not None
    assert source is not None
    cited = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    nodes = (root / "integrations" / "comfyui" / "pyproject.toml").read_text(encoding="utf-8")
    packed = re.search(r'^version = "(.*)"$', nodes, re.MULTILINE)
    assert packed is not None
    return {
        "CHANGELOG.md": heading[1],
        "version.py": source[1],
        "CITATION.cff": str(cited["version"]),
        "integrations/comfyui/pyproject.toml": packed[1],
    }


def test_one_version_everywhere() -> None:
    assert set(versions(ROOT).values()) == {segkern.__version__}
    assert VERSION.fullmatch(segkern.__version__)


def test_the_newest_heading_of_the_changelog_comes_first() -> None:
    headings = re.findall(r"^## (\d+)\.(\d+)\.(\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    numbers = [tuple(map(int, heading)) for heading in headings]
    assert numbers == sorted(set(numbers), reverse=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with copies of the files that contain the version."""
    for name in PLACES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8")
    text = re.sub(r"^## .*$", "## 7.0.0 - unreleased", changelog, count=1, flags=re.MULTILINE)
    (tmp_path / "CHANGELOG.md").write_text(text, encoding="utf-8")
    return tmp_path


def test_a_release_changes_the_version_everywhere(checkout: Path) -> None:
    release(checkout, "7.0.1", datetime.date(2031, 5, 4))
    assert set(versions(checkout).values()) == {"7.0.1"}
    assert "## 7.0.1 - 2031-05-04\n" in (checkout / "CHANGELOG.md").read_text(encoding="utf-8")
    cited = yaml.safe_load((checkout / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["date-released"] == datetime.date(2031, 5, 4)
    with pytest.raises(ValueError, match=r"CHANGELOG\.md has no line.*released already"):
        release(checkout, "7.0.2", datetime.date(2031, 5, 5))
    assert set(versions(checkout).values()) == {"7.0.1"}


@pytest.mark.parametrize("version", ["1", "1.2", "v1.2.3", "01.2.3", "1.2.3-beta", ""])
def test_what_is_no_version_changes_nothing(checkout: Path, version: str) -> None:
    before = versions(checkout)
    with pytest.raises(ValueError, match=re.escape(repr(version))):
        release(checkout, version, datetime.date(2031, 5, 4))
    assert versions(checkout) == before


def test_the_citation_names_the_method() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(cited)
    assert cited["authors"] == [{"name": "The segkern authors"}]
    (paper,) = cited["references"]
    assert paper["url"] == "https://arxiv.org/abs/2408.00760"
    assert paper["identifiers"][0]["value"] == "arXiv:2408.00760"
    assert paper["title"] in re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(FORMS.glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_are_what_the_host_accepts(path: Path) -> None:
    form: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form == {"blank_issues_enabled": False}
        return
    assert set(form) == {"name", "description", "labels", "body"}
    assert len(form["description"]) <= 200
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert asked
    assert len({part["id"] for part in asked}) == len(asked)
    assert len({part["attributes"]["label"] for part in asked}) == len(asked)
    for part in asked:
        assert part["type"] in ("input", "textarea")
        assert set(part) <= {"type", "id", "attributes", "validations"}
        assert set(part["attributes"]) <= {"label", "description", "placeholder", "render"}
        assert re.fullmatch(r"[a-z-]+", part["id"])
        assert all(isinstance(text, str) for text in part["attributes"].values())
    assert any(part.get("validations", {}).get("required") for part in asked)


def test_a_report_of_a_fault_holds_what_is_needed() -> None:
    form = yaml.safe_load((FORMS / "bug.yml").read_text(encoding="utf-8"))
    needed = {part["id"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert {"what", "expected", "example", "report"} <= needed
    labels = [part["attributes"]["label"] for part in form["body"]]
    assert any("segkern info --report" in label for label in labels)


@pytest.mark.parametrize(
    "name", ["SECURITY.md", "CODE_OF_CONDUCT.md", "RELEASING.md", "CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"]
)
def test_pages_name_files_and_targets_that_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    for targets in re.findall(r"`make ([a-z -]+)", text):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert not re.search(r"[\w.]+@[\w-]+\.\w+|github\.com/", text), "this address may not exist"
