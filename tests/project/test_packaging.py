# SPDX-License-Identifier: Apache-2.0
"""The distributions in ``dist/``, which ``make wheel`` builds and CI builds first: their files and metadata."""

from __future__ import annotations

import email
import email.message
import importlib.util
import re
import runpy
import tarfile
import zipfile
from pathlib import Path

import pytest

import segkern

ROOT = Path(__file__).resolve().parents[2]


def files_under(folder: Path) -> set[str]:
    """Return the names of all source files below ``folder``."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


def distribution(pattern: str) -> Path:
    """Return the one distribution of this kind that is newer than the sources; skip the test if there is none."""
    sources = [ROOT / folder / name for folder in ("segkern", "integrations") for name in files_under(ROOT / folder)]
    newest = max(path.stat().st_mtime for path in [*sources, ROOT / "README.md", ROOT / "pyproject.toml"])
    built = list((ROOT / "dist").glob(pattern))
    if len(built) != 1 or built[0].stat().st_mtime < newest:
        pytest.skip("dist/ is not built from these sources; make wheel does")
    return built[0]


@pytest.fixture
def wheel() -> zipfile.ZipFile:
    return zipfile.ZipFile(distribution("*.whl"))


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    return email.message_from_bytes(wheel.read(f"segkern-{segkern.__version__}.dist-info/METADATA"))


def test_wheel_holds_the_package_and_the_integrations_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {f"segkern/{name}" for name in files_under(ROOT / "segkern")}
    expected |= {f"segkern/integrations/{name}" for name in files_under(ROOT / "integrations")}
    assert {"segkern/py.typed", "segkern/checkpoints/demo/unet/diffusion_pytorch_model.safetensors"} <= expected
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_wheel_says_what_it_is_and_needs(wheel: zipfile.ZipFile, metadata: email.message.Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("segkern", segkern.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    always = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert len(always) == 1, always
    assert always[0].startswith("torch>=")
    commands = wheel.read(f"segkern-{segkern.__version__}.dist-info/entry_points.txt").decode()
    assert "segkern = segkern.cli:main" in commands


def test_the_index_shows_a_readme_without_links_that_lead_nowhere_there(metadata: email.message.Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    page, readme = str(metadata.get_payload()), (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https?:)", readme), "the README should have links to files"
    assert not re.findall(r"\]\((?!https?:)", page)
    assert re.findall(r"\]\(https?:[^)]*\)", page) == re.findall(r"\]\(https?:[^)]*\)", readme)
    assert re.findall(r"^(?:#.*|```.*)", page, re.MULTILINE) == re.findall(r"^(?:#.*|```.*)", readme, re.MULTILINE)


def test_source_archive_holds_what_testing_it_needs() -> None:
    with tarfile.open(distribution("*.tar.gz")) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    for folder in ("segkern", "integrations", "studies", "benchmarks", "docs", "tests", ".github", ".ci"):
        assert {f"{folder}/{name}" for name in files_under(ROOT / folder)} <= names, folder
    assert {
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
    } <= names
    assert {"CONTRIBUTING.md", "SECURITY.md", "RELEASING.md", "CODE_OF_CONDUCT.md", "setup.py"} <= names


def test_the_adapter_says_which_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "segkern\[diffusers\]"') as raised:
        runpy.run_path(str(ROOT / "integrations" / "diffusers" / "__init__.py"))
    assert raised.value.name == "diffusers"
