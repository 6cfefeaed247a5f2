# SPDX-License-Identifier: Apache-2.0
"""Outcomes of tests with other versions are counted as pytest gives them, and docs/releases.md says them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import releases, releases_page
from tests.project import benchmark_tools  # noqa: F401  benchmarks/ is no installed package

ROOT = Path(__file__).parents[2]
PROGRAM = """
import pytest

def test_right():
    pass

def test_wrong():
    assert 1 == 2, "too far"

@pytest.fixture
def broken():
    raise OSError("no file")

def test_error(broken):
    pass

@pytest.mark.parametrize("size", [1, 2])
def test_skipped(size):
    pytest.skip("no device")

@pytest.mark.xfail(reason="known")
def test_known():
    assert False
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is read of a run with each outcome."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "test_x.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", "--junit-xml", "x.xml", "test_x.py"]
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return releases.outcomes(folder / "x.xml")


def record(found: dict[str, Any], **environment: str) -> dict[str, Any]:
    versions = dict.fromkeys(("torch", "triton", "numpy", "diffusers", "transformers", "commit"), "1.0")
    return {"schema": 1, "tests": "all", "environment": {"python": "3.10.2", **versions, **environment}, **found}


def test_every_outcome_is_counted(found: dict[str, Any]) -> None:
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 2, "expected to fail": 1}
    assert found["skips"] == {"no device": 2}
    wrong, error = found["failures"]
    assert wrong["test"] == "test_x.py::test_wrong"
    assert "too far" in wrong["reason"]
    assert "no file" in error["reason"]


def test_the_page_names_failures_and_reasons(found: dict[str, Any]) -> None:
    page = releases_page.page([record(found, torch="2.11.0+cu130")], [])
    assert "| 3.10.2 | 2.11.0+cu130 | 1.0 | 1.0 | 1.0 | 1.0 | all | 1 | **2** | 3 | `1.0` |" in page
    assert "`test_x.py::test_wrong`: AssertionError: too far" in page
    assert "- no device (up to 2 in a row)" in page


def test_rows_come_by_version_as_numbers(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "FOLDER", tmp_path)
    for i, (python, torch) in enumerate([("3.12.1", "2.9.0"), ("3.9.1", "2.13.0"), ("3.12.1", "2.11.0+cu130")]):
        (tmp_path / f"python-{i}.json").write_text(json.dumps(record(found, python=python, torch=torch)))
    rows = [(each["environment"]["python"], each["environment"]["torch"]) for each in releases.committed()]
    assert rows == [("3.9.1", "2.13.0"), ("3.12.1", "2.9.0"), ("3.12.1", "2.11.0+cu130")]
    (tmp_path / "python-9.json").write_text('{"schema": 9}')
    with pytest.raises(ValueError, match="schema 9"):
        releases.committed()


def test_files_of_the_kernels_exist() -> None:
    for pattern in releases.KERNELS:
        assert list(ROOT.glob(pattern)), pattern


@pytest.mark.parametrize(
    "python, tests, words",
    [(Path(sys.executable), "some", "'some'"), (Path("/bin/false"), "all", "cannot import")],
    ids=["tests", "python"],
)
def test_what_cannot_run_is_refused(python: Path, tests: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        releases.run(python, tests)


def test_a_page_says_what_an_environment_could_not_do() -> None:
    row = {"name": "cli", "uses": ["a picture"], "packages": {"a": "1"}, "failures": {"a picture": "no | file"}}
    extras = {"environment": {"python": "3.10.2", "platform": "Linux", "commit": "1.0"}, "extras": [row]}
    assert "| cli | 1 | a picture | **failed**: a picture: no \\| file |" in releases_page.page([], [extras])
