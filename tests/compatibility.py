# SPDX-License-Identifier: Apache-2.0
"""Marks of tests that prove a guidance on a model in a task, and a record of their outcomes.

A test says with ``proves(...)`` what it proves, in one mark or in several that add up: one on the function, others on
its parameters, ``pytest.param("sdxl", marks=proves(model="Stable Diffusion XL"))``. With ``--compatibility FILE`` the
outcomes are written there, and ``docs/models.md`` is made from such files.
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
    "modular pipeline",
)
GUIDANCES = ("SEG", "SEG at infinity", "PAG", "SAG", "CFG")
SCHEMA = 1
NEEDED = ("group", "model", "task", "guidance")
_KNOWN = {"group": GROUPS, "task": TASKS, "guidance": GUIDANCES}
_PROPERTY = "proves"


def write(path: Path, outcomes: dict[str, Any]) -> None:
    """A file with a line for each test."""
    parts = []
    for name, value in outcomes.items():
        if isinstance(value, list):
            parts.append(f'"{name}": [\n' + ",\n".join(map(json.dumps, value)) + "\n]")
        else:
            parts.append(f'"{name}": {json.dumps(value, indent=1)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def reason_of(report: pytest.TestReport) -> str:
    """Why a phase of a test was skipped or failed, in one line; nothing for one that passed."""
    if report.skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else "expected to fail"
        return reason.removeprefix("Skipped: ")
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        return str(getattr(crash, "message", report.longrepr)).splitlines()[0]
    return ""


def proves(**cell: str | tuple[str, ...]) -> pytest.MarkDecorator:
    """A mark for a test or a parameter of one; nearer ones go before others.

    Args:
        cell: any of ``group`` (``GROUPS``, UNets if not given), ``model`` (its name in words), ``task`` (``TASKS``) and
            ``guidance`` (``GUIDANCES``, or several of them that act together).
    """
    unknown = set(cell) - set(NEEDED)
    for name, given in cell.items():
        values = given if name == "guidance" and isinstance(given, tuple) else (given,)
        unknown |= {str(value) for value in values if value not in _KNOWN.get(name, values)}
    if unknown:
        raise ValueError(f"proves(...) takes {', '.join(NEEDED)} of {_KNOWN}, got {sorted(unknown)}")
    return pytest.mark.proves(**cell)


def cell_of(item: pytest.Item) -> dict[str, Any] | None:
    """What a test proves, all its marks together; None for nothing.

    Raises:
        pytest.UsageError: when the marks leave something open.
    """
    cell: dict[str, Any] = {"group": "UNets"}
    marks = list(item.iter_markers("proves"))  # the nearest first
    for mark in reversed(marks):
        cell |= mark.kwargs
    missing = [name for name in NEEDED if name not in cell]
    if marks and missing:
        raise pytest.UsageError(f"{item.nodeid} proves something, but its marks do not say {', '.join(missing)}")
    if not marks:
        return None
    guidances = cell["guidance"]
    cell["guidance"] = list(guidances) if isinstance(guidances, tuple) else [guidances]
    return {name: cell[name] for name in NEEDED}


class Outcomes:
    """The outcomes of the tests of a run that prove something.

    Args:
        path: of the file to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        self._about: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test's worst phase: an error of a fixture is a failure too."""
        proved = dict(report.user_properties).get(_PROPERTY)
        if proved is None or (report.passed and report.when != "call"):
            return
        cell = dict(proved)
        self._about[report.nodeid.partition("[")[0]] = cell.pop("about")
        row = {**cell, "outcome": report.outcome, "reason": reason_of(report), "test": report.nodeid}
        if self._rows.get(report.nodeid, {}).get("outcome") != "failed":
            self._rows[report.nodeid] = row

    def pytest_sessionfinish(self) -> None:
        """Write them, with versions and commit."""
        import torch

        from segkern.core.environment import environment, version_of

        about = environment(torch.device("cpu"), "transformers", "accelerate")
        about = {key: value for key, value in about.items() if key not in ("device", "threads")}
        # With xdist the tests, and with them diffusers, are in other processes; they have the same search path.
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
    parser.addoption("--compatibility", metavar="FILE", help="write what became of the tests that prove something")


def pytest_configure(config: pytest.Config) -> None:
    note(config, "--compatibility", Outcomes)


def note(config: pytest.Config, option: str, kind: Callable[[Path], object]) -> None:
    """Have outcomes noted, if the option names a file; with xdist the process that starts the others does."""
    path = config.getoption(option)
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(kind(Path(path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every report of a test carries what the test proves, also from another process."""
    for item in items:
        cell = cell_of(item)
        if cell is not None:
            doc = getattr(item, "function", item).__doc__ or ""
            item.user_properties.append((_PROPERTY, {**cell, "about": " ".join(doc.partition("\n\n")[0].split())}))
