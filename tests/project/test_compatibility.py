# SPDX-License-Identifier: Apache-2.0
"""Tests declare what they check, their outcomes are recorded, and docs/models.md matches the records."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from segkern.integrations.diffusers.models.architectures import ARCHITECTURES, LINEAR, UNET_DEFAULT
from tests.compatibility import cell_of, proves, write
from tests.project import benchmark_tools  # noqa: F401  makes benchmarks/ importable, which is not installed

from benchmarks import compatibility, doc_tables  # isort: skip

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def row(guidance: str, outcome: str, reason: str = "", model: str = "A") -> dict[str, Any]:
    cell = {"group": "UNets", "model": model, "task": "text to image", "guidance": guidance.split("+")}
    return {**cell, "outcome": outcome, "reason": reason, "test": f"tests/test_x.py::test_x[{guidance}-{model}]"}


def test_marks_add_up_and_the_nearest_goes_before_others() -> None:
    marks = [proves(guidance="PAG").mark, proves(model="A", task="inpainting", guidance="SEG").mark]
    item: Any = SimpleNamespace(nodeid="test_x", iter_markers=lambda name: iter(marks))
    assert cell_of(item) == {"group": "UNets", "model": "A", "task": "inpainting", "guidance": ["PAG"]}
    marks.pop()
    with pytest.raises(pytest.UsageError, match="test_x has the mark proves, but its marks lack model, task"):
        cell_of(item)
    marks.pop()
    assert cell_of(item) is None


@pytest.mark.parametrize("cell", [{"task": "drawing"}, {"guidance": "seg"}, {"pipeline": "A"}, {"group": "Images"}])
def test_a_mark_takes_known_words(cell: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(cell if "pipeline" in cell else cell.values()))):
        proves(**cell)


def test_a_cell_is_what_all_its_tests_say(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [row("SEG", "passed"), row("SEG", "failed", "a | b"), row("SAG", "skipped", "no scheduler")]
    new = [row("SEG", "passed"), row("SEG+PAG", "passed"), row("SAG", "skipped", "x"), row("SAG", "passed")]
    monkeypatch.setattr(compatibility, "committed", lambda: {"1.9": {"tests": old}, "1.10": {"tests": new}})
    assert doc_tables.models("UNets").splitlines()[2:] == [
        "| A | text to image | SEG | **no**: a \\| b | yes |",
        "| A | text to image | PAG | not tested | yes |",
        "| A | text to image | SAG | not tested: no scheduler | yes |",
    ]


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"schema": 2, "tests": [{"a": 1}, {"b": 2}]})
    with pytest.raises(ValueError, match="has schema 2"):
        compatibility.read(tmp_path / "a.json")


def test_the_page_names_what_is_refused_and_all_defaults() -> None:
    for name, reason in LINEAR.items():
        assert f"| `{name}` | {reason} |" in PAGE
    for architecture in ARCHITECTURES.values():
        layers, whose = architecture.default or ("the block in the middle", "none known")
        assert re.search(
            rf"^\| {re.escape(architecture.users)} \| `?{re.escape(layers)}`? \| {whose}", PAGE, re.MULTILINE
        )
    assert f"| all UNets | `{UNET_DEFAULT[0]}` | {UNET_DEFAULT[1]} |" in PAGE


def test_the_files_are_of_the_versions_that_are_tested() -> None:
    """The pinned diffusers, and the oldest that the package's metadata allows, pinned for the oldest Python."""
    pins = re.findall(r"^diffusers==([\d.]+);", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert sorted(compatibility.committed()) == sorted(pins)
    (least,) = re.findall(r"\"diffusers>=([\d.]+)\"", (ROOT / "pyproject.toml").read_text())
    assert next(iter(compatibility.committed())) == f"{least}.0"


def test_every_test_that_a_file_names_exists_and_has_words() -> None:
    for file in compatibility.committed().values():
        assert all(file["about"].values())
        for name in file["about"]:
            path, _, function = name.partition("::")
            assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), name
