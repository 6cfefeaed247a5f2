# SPDX-License-Identifier: Apache-2.0
"""Tests say what they survive, inputs are counted, and docs/reliability.md says what was kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import outcomes, reliability, reliability_page
from tests.project import benchmark_tools
from tests.reliability import AREAS, fault_of, survives

ROOT = Path(__file__).parents[2]

PROGRAM = """
import pytest
from hypothesis import given, settings, strategies as st
from tests.reliability import survives, tried

pytestmark = survives("inputs", "anything")

@settings(max_examples=7, database=None, suppress_health_check=["function_scoped_fixture"])
@given(number=st.integers(0, 10**9))
def test_many(number, tried):
    tried()
    tried(2)

@survives("long runs", "too far")
@pytest.mark.parametrize("fails", [False, True])
def test_a(fails):
    assert not fails, "too far"

@pytest.fixture
def broken():
    raise OSError("no file")

def test_error(broken):
    pass

def test_skipped(tried):
    tried(9)
    pytest.skip("no device")
"""


def row(fault: str, outcome: str, inputs: int = 1, area: str = "inputs") -> dict[str, Any]:
    reason = "" if outcome == "passed" else "why"
    return {"area": area, "fault": fault, "inputs": inputs, "outcome": outcome, "reason": reason, "test": "test_x"}


@pytest.mark.slow
def test_outcomes_of_a_run_are_written(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(PROGRAM)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = survives: x\n")
    out = tmp_path / "found" / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "reliability", "-n", "1", "-m", "survives"]
    ran = subprocess.run(
        [*command, "--reliability", str(out), str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    found = outcomes.read(out, reliability.SCHEMA)
    assert {"device", "device_type", "python", "torch", "triton", "segkern", "commit"} <= set(found["environment"])
    told = {test["test"].partition("::")[2]: test for test in found["tests"]}
    assert len(told) == 5
    assert told["test_many"]["outcome"] == "passed"
    assert told["test_many"]["inputs"] >= 3 * 7
    assert told["test_many"]["seconds"] > 0
    assert told["test_a[False]"] | {"seconds": 0} == {
        "area": "long runs",
        "fault": "too far",
        "inputs": 1,
        "outcome": "passed",
        "reason": "",
        "seconds": 0,
        "test": "test_some.py::test_a[False]",
    }
    assert told["test_a[True]"]["outcome"] == told["test_error"]["outcome"] == "failed"
    assert "no file" in told["test_error"]["reason"]
    assert (told["test_skipped"]["inputs"], told["test_skipped"]["reason"]) == (0, "no device")


def test_marks_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'weather'"):
        survives("weather", "rain")
    item: Any = SimpleNamespace(nodeid="test_x", get_closest_marker=lambda name: pytest.mark.survives("inputs").mark)
    with pytest.raises(pytest.UsageError, match="test_x has a mark"):
        fault_of(item)


def test_a_fault_has_a_row_and_all_have_one() -> None:
    tests = [
        row("steps", "passed", 1200, "long runs"),
        row("NaN", "passed", 5),
        row("NaN", "failed", 2),
        row("streams", "skipped", 0, "devices and compilers"),
    ]
    assert reliability_page.lines(tests) == [
        ["inputs", "NaN", "7", "1 of 2"],
        ["devices and compilers", "streams", "0", "not run"],
        ["long runs", "steps", "1,200", "1 of 1"],
        ["all", "", "1,207", "2 of 3"],
    ]
    named = {name: name for name in ("device", "torch", "triton", "diffusers", "transformers", "python", "commit")}
    page = reliability_page.page({"a": {"environment": named | {"device_type": "cpu"}, "tests": tests}})
    assert "2 of 3 tests survived, 1 skipped; 1,207 inputs tried" in page
    assert "Failed:\n\n- `test_x`: why" in page
    assert "for want of a CUDA device" in page
    assert reliability_page._AREAS == AREAS


def test_the_command_ends_with_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"environment": {"device": "A CPU", "commit": "a"}, "tests": [row("NaN", "failed")]}
    for code in (0, 1):
        monkeypatch.setattr(outcomes, "run", lambda *_, code=code: ("{}", found, code))
        ran = benchmark_tools.command("reliability", "--out", tmp_path / "folder" / "out.json")
        assert ran.exit_code == code, ran.output
        assert "0 of 1 tests survived; 1 inputs tried" in ran.output
    assert (tmp_path / "folder" / "out.json").read_text() == "{}"


def test_what_has_run_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    ran = benchmark_tools.command("reliability", "--out", tmp_path / "out.json")
    assert ran.exit_code == 2
    assert "pytest ended with 2" in ran.output
    assert not (tmp_path / "out.json").exists()


def test_every_test_that_a_file_names_exists() -> None:
    for found in reliability.committed().values():
        for test in found["tests"]:
            path, _, function = test["test"].partition("::")
            name = re.sub(r"\[.*", "", function, flags=re.DOTALL)
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), test["test"]
