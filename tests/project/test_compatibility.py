# SPDX-License-Identifier: Apache-2.0
"""Tests say what they prove, their outcomes are kept, and docs/models.md says what was kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import compatibility, models_page
from segkern.integrations.diffusers import SEG
from segkern.integrations.diffusers.models.architectures import ARCHITECTURES, LINEAR, UNET_DEFAULT
from tests.compatibility import cell_of, proves, write
from tests.project import benchmark_tools  # noqa: F401  benchmarks/ is no installed package

ROOT = Path(__file__).parents[2]

PROGRAM = '''
import pytest
from tests.compatibility import proves

@proves(model="A", task="text to image")
@pytest.mark.parametrize("fails", [pytest.param(False, marks=proves(guidance="SEG")),
                                   pytest.param(True, marks=proves(guidance="PAG"))])
def test_a(fails):
    """What it
    compares.

    More.
    """
    assert not fails, "too far"

@pytest.fixture
def broken():
    raise OSError("no file")

@proves(group="Video", model="B", task="text to video", guidance="SEG")
def test_error(broken):
    pass

@proves(model="A", task="inpainting", guidance="SAG")
def test_skipped():
    pytest.skip("no scheduler")

def test_other():
    pass
'''


def row(guidance: str, outcome: str, reason: str = "", model: str = "A") -> dict[str, Any]:
    cell = {"group": "UNets", "model": model, "task": "text to image", "guidance": guidance.split("+")}
    return {**cell, "outcome": outcome, "reason": reason, "test": f"tests/test_x.py::test_x[{guidance}-{model}]"}


def file_of(*rows: dict[str, Any]) -> dict[str, Any]:
    versions = {"transformers": "5", "torch": "2", "python": "3", "commit": "abc"}
    return {"environment": versions, "about": {"tests/test_x.py::test_x": "Something."}, "tests": list(rows)}


@pytest.mark.slow
def test_outcomes_of_a_run_are_written(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(PROGRAM)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = proves: x\n")
    out = tmp_path / "found" / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "compatibility", "-n", "1", "-m", "proves"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
    ran = subprocess.run(
        [*command, "--compatibility", str(out), str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    found = compatibility.read(out)
    assert {"diffusers", "torch", "transformers", "commit"} <= set(found["environment"])
    assert found["about"]["test_some.py::test_a"] == "What it compares."
    told = {(each["model"], *each["guidance"]): (each["outcome"], each["reason"]) for each in found["tests"]}
    assert told["A", "SEG"] == ("passed", "")
    assert told["A", "SAG"] == ("skipped", "no scheduler")
    assert told["A", "PAG"][0] == told["B", "SEG"][0] == "failed"
    assert "too far" in told["A", "PAG"][1]
    assert "no file" in told["B", "SEG"][1]
    assert len(found["tests"]) == 4
    assert len(out.read_text().splitlines()) < 30  # a line for each test


def test_marks_add_up_and_the_nearest_goes_before_others() -> None:
    marks = [proves(guidance="PAG").mark, proves(model="A", task="inpainting", guidance="SEG").mark]
    item: Any = SimpleNamespace(nodeid="test_x", iter_markers=lambda name: iter(marks))
    assert cell_of(item) == {"group": "UNets", "model": "A", "task": "inpainting", "guidance": ["PAG"]}
    marks.pop()
    with pytest.raises(pytest.UsageError, match="test_x proves something, but its marks do not say model, task"):
        cell_of(item)
    marks.pop()
    assert cell_of(item) is None


@pytest.mark.parametrize("cell", [{"task": "drawing"}, {"guidance": "seg"}, {"pipeline": "A"}, {"group": "Images"}])
def test_a_mark_takes_known_words(cell: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(cell if "pipeline" in cell else cell.values()))):
        proves(**cell)


def test_a_cell_is_what_all_its_tests_say() -> None:
    files = {
        "1.9": file_of(row("SEG", "passed"), row("SEG", "failed", "a | b"), row("SAG", "skipped", "no scheduler")),
        "1.10": file_of(row("SEG", "passed"), row("PAG", "passed"), row("SAG", "skipped", "x"), row("SAG", "passed")),
    }
    assert models_page.lines(models_page.cells(files), files) == [
        ["A", "text to image", "SEG", "*no*: a \\| b", "**yes**"],
        ["A", "text to image", "PAG", "not tested", "**yes**"],
        ["A", "text to image", "SAG", "not tested: no scheduler", "**yes**"],
    ]
    same = {"1.9": file_of(row("SEG+CFG", "passed"), row("SEG", "passed", model="B"))}
    assert models_page.lines(models_page.cells(same), same) == [
        ["A", "text to image", "SEG, CFG", "**yes**"],
        ["B", "text to image", "SEG", "**yes**"],
    ]
    page = models_page.page(files)
    assert "diffusers 1.9: 1 of 3 tests passed; transformers 5, torch 2, Python 3, commit `abc`." in page
    assert "- Something. `tests/test_x.py::test_x`" in page


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"schema": 2, "tests": [{"a": 1}, {"b": 2}]})
    assert json.loads((tmp_path / "a.json").read_text())["tests"] == [{"a": 1}, {"b": 2}]
    with pytest.raises(ValueError, match="has schema 2"):
        compatibility.read(tmp_path / "a.json")


def test_the_page_names_what_is_refused_and_all_defaults() -> None:
    page = models_page.page({})
    assert "Nothing has run yet" in page
    for name, reason in LINEAR.items():
        assert f"| `{name}` | {reason} |" in page
    for architecture in ARCHITECTURES.values():
        assert f"| {architecture.users} | " in page
    assert SEG().layers == UNET_DEFAULT[0]


def test_the_page_is_what_the_result_files_give() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == models_page.page(compatibility.committed()), "run python -m benchmarks.readme"


def test_the_files_are_of_the_versions_that_are_tested() -> None:
    """The pinned diffusers, and the oldest that the package's metadata allows: the pin of the oldest Python."""
    pins = re.findall(r"^diffusers==([\d.]+);", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert sorted(compatibility.committed()) == sorted(pins)
    (least,) = re.findall(r"\"diffusers>=([\d.]+)\"", (ROOT / "pyproject.toml").read_text())
    assert f"{least}.0" in pins
    assert next(iter(compatibility.committed())) == f"{least}.0"


def test_every_test_that_a_file_names_exists_and_has_words() -> None:
    for found in compatibility.committed().values():
        assert all(found["about"].values())
        for name in found["about"]:
            path, _, function = name.partition("::")
            assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), name
