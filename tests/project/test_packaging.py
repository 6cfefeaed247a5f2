# SPDX-License-Identifier: Apache-2.0
"""What the distributions hold, and that they work outside the checkout."""

from __future__ import annotations

import email
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import segkern

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", ".git", ".venv", ".*_*", ".h*", "build", "dist", "outputs", "*.egg-info"
)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel built from that archive."""
    checkout = tmp_path_factory.mktemp("checkout") / "segkern"
    shutil.copytree(ROOT, checkout, ignore=LEFT_OUT)
    out = checkout / "dist"
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder of its own, as an installer lays it out."""
    site = tmp_path_factory.mktemp("site")
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def files_under(folder: Path) -> set[str]:
    """Names of all files below ``folder`` that belong to the sources."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


def test_wheel_holds_every_file_of_the_package_and_of_the_integrations(installed: Path) -> None:
    assert files_under(installed / "segkern" / "integrations") == files_under(ROOT / "integrations")
    own = {name for name in files_under(installed / "segkern") if not name.startswith("integrations/")}
    assert own == files_under(ROOT / "segkern")
    assert {"py.typed", "checkpoints/demo/unet/diffusion_pytorch_model.safetensors"} <= own


def test_wheel_holds_nothing_else(installed: Path) -> None:
    top = {path.name for path in installed.iterdir()}
    assert top == {"segkern", f"segkern-{segkern.__version__}.dist-info"}


def test_wheel_says_what_it_is_and_needs(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    metadata = email.message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Name"] == "segkern"
    assert metadata["Version"] == segkern.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    pythons = [line.rpartition(" ")[2] for line in metadata.get_all("Classifier", []) if ":: 3." in line]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    always = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert len(always) == 1, always
    assert always[0].startswith("torch>=")
    assert "segkern = segkern.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")


def test_the_index_shows_a_readme_without_links_that_lead_nowhere_there(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    metadata = email.message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    page, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https?:)", readme), "the README has links to files"
    assert not re.findall(r"\]\((?!https?:)", page)
    assert re.findall(r"\]\(https?:[^)]*\)", page) == re.findall(r"\]\(https?:[^)]*\)", readme)
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        line for line in readme.splitlines() if line.startswith("#")
    ]
    assert "    make demo" in page
    assert page.count("```") == readme.count("```")


def test_source_archive_holds_what_testing_it_needs(distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {"Makefile", "constraints.txt", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"} <= names
    assert {"SECURITY.md", "RELEASING.md", ".github/ISSUE_TEMPLATE/bug.yml"} <= names
    assert {
        "tests/project/test_packaging.py",
        "training/denoiser.py",
        "integrations/__init__.py",
        "docs/evaluation.md",
    } <= names


def test_the_adapter_says_which_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "segkern\[diffusers\]"') as raised:
        runpy.run_path(str(ROOT / "integrations" / "diffusers" / "__init__.py"))
    assert raised.value.name == "diffusers"


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, absent",
    [
        ("segkern", {"triton", "diffusers", "transformers", "typer", "PIL", "torchmetrics", "matplotlib"}),
        ("segkern.cli", {"triton", "diffusers", "transformers", "typer", "PIL", "torchmetrics", "matplotlib"}),
        ("segkern.integrations.diffusers", {"triton", "typer"}),
    ],
)
def test_importing_the_installed_wheel_brings_in_only_what_it_needs(
    installed: Path, tmp_path: Path, module: str, absent: set[str]
) -> None:
    """Counted without what torch or diffusers import themselves."""
    dependency = "diffusers" if "diffusers" in module else "torch"
    program = (
        f"import sys, {dependency}; before = set(sys.modules)\n"
        f"import {module} as module\n"
        "print(module.__file__, *{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    where, *imported = ran.stdout.split()
    assert Path(where).is_relative_to(installed)
    assert not absent & set(imported)
