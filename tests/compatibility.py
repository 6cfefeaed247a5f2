# SPDX-License-Identifier: Apache-2.0
"""Marks of tests that check a guidance method on a model in a task, and a record of their outcomes.

``proves(...)`` states what a test checks, in one mark or in several that are merged: one on the function and others on
its parameters, as in ``pytest.param("sdxl", marks=proves(model="Stable Diffusion XL"))``. ``--compatibility FILE``
writes the outcomes to a file. ``docs/models.md`` is generated from such files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GROUPS = ("UNets", "Transformers", "Video")
TASKS = (
    "text to image",
    "image to image",
    "inpainting",
    "editing",
    "depth to image",
    "upscaling",
    "ControlNet",
    "T2I-Adapter",
    "IP-Adapter",
    "text to video",
    "image to video",
    "video to video",
    "control video",
    "modular pipeline",
)
GUIDANCES = ("SEG", "SEG at infinity", "PAG", "SAG", "SLG", "TPG", "CFG")
SCHEMA = 1
NEEDED = ("group", "model", "task", "guidance")
_KNOWN = {"group": GROUPS, "task": TASKS, "guidance": GUIDANCES}
_PROPERTY = "proves"


def write(path: Path, outcomes: dict[str, Any]) -> None:
    """Write a file with one line per test."""
    parts = []
    for name, value in outcomes.items():
        if isinstance(value, list):
            parts.append(f'"{name}": [\n' + ",\n".join(map(json.dumps, value)) + "\n]")
        else:
            parts.append(f'"{name}": {json.dumps(value, indent=1)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def reason_of(report: pytest.TestReport) -> str:
    """Return why a phase of a test was skipped or failed, in one line, or an empty string if it passed."""
    if report.skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else "expected to fail"
        return reason.removeprefix("Skipped: ")
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        return str(getattr(crash, "message", report.longrepr)).splitlines()[0]
    return ""


def proves(**cell: str | tuple[str, ...]) -> pytest.MarkDecorator:
    """Return a mark for a test or one of its parameters. The mark nearest to the test case takes precedence.

    Args:
        cell: Any of ``group`` (from ``GROUPS``, UNets by default), ``model`` (its name), ``task`` (from ``TASKS``) and
            ``guidance`` (from ``GUIDANCES``, or several that are combined).
    """
    unknown = set(cell) - set(NEEDED)
    for name, given in cell.items():
        values = given if name == "guidance" and isinstance(given, tuple) else (given,)
        unknown |= {str(value) for value in values if value not in _KNOWN.get(name, values)}
    if unknown:
        raise ValueError(f"proves(...) accepts {', '.join(NEEDED)} of {_KNOWN}, got {sorted(unknown)}")
    return pytest.mark.proves(**cell)


def cell_of(item: pytest.Item) -> dict[str, Any] | None:
    """Return what a test checks, merged from all its marks, or None without marks.

    Raises:
        pytest.UsageError: If the marks are incomplete.
    """
    cell: dict[str, Any] = {"group": "UNets"}
    marks = list(item.iter_markers("proves"))  # nearest first
    for mark in reversed(marks):
        cell |= mark.kwargs
    missing = [name for name in NEEDED if name not in cell]
    if marks and missing:
        raise pytest.UsageError(f"{item.nodeid} has the mark proves, but its marks lack {', '.join(missing)}")
    if not marks:
        return None
    guidances = cell["guidance"]
    cell["guidance"] = list(guidances) if isinstance(guidances, tuple) else [guidances]
    return {name: cell[name] for name in NEEDED}


class Outcomes:
    """The outcomes of the marked tests of a run.

    Args:
        path: File to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        self._about: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a test's worst phase. An error of a fixture is a failure too."""
        proved = dict(report.user_properties).get(_PROPERTY)
        if proved is None or (report.passed and report.when != "call"):
            return
        cell = dict(proved)
        self._about[report.nodeid.partition("[")[0]] = cell.pop("about")
        row = {**cell, "outcome": report.outcome, "reason": reason_of(report), "test": report.nodeid}
        if self._rows.get(report.nodeid, {}).get("outcome") != "failed":
            self._rows[report.nodeid] = row

    def pytest_sessionfinish(self) -> None:
        """Write the outcomes with versions and commit."""
        import torch

        from segkern.core.environment import environment, version_of

        about = environment(torch.device("cpu"), "transformers", "accelerate")
        about = {key: value for key, value in about.items() if key not in ("device", "threads")}
        # With xdist, the tests, and so diffusers, are in other processes with the same search path.
        version = getattr(sys.modules.get("diffusers"), "__version__", version_of("diffusers"))
        write(
            self._path,
            {
                "schema": SCHEMA,
                "environment": {"diffusers": version, **about},
                "about": {test: self._about[test] for test in sorted(self._about)},
                "tests": [self._rows[test] for test in sorted(self._rows)],
            },
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", metavar="FILE", help="write the outcomes of the tests marked proves")


def pytest_configure(config: pytest.Config) -> None:
    note(config, "--compatibility", Outcomes)


def note(config: pytest.Config, option: str, kind: Callable[[Path], object]) -> None:
    """Record outcomes if the option names a file. With xdist, only the main process records."""
    path = config.getoption(option)
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(kind(Path(path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the data of its marks to every report of a test, so it is available in the main process of xdist."""
    for item in items:
        cell = cell_of(item)
        if cell is not None:
            doc = getattr(item, "function", item).__doc__ or ""
            item.user_properties.append((_PROPERTY, {**cell, "about": " ".join(doc.partition("\n\n")[0].split())}))
