# SPDX-License-Identifier: Apache-2.0
"""Which tests put a fault or many inputs to the package, how many inputs each of them tried, and what became of it.

A test says with ``survives(area, fault)`` what it puts in, and calls the fixture ``tried`` with the number of inputs
that it has been through, as often as it likes; one that never does has tried one. With ``--reliability FILE`` the
outcomes are written there, and ``docs/reliability.md`` is made from such files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility import note, reason_of, write

AREAS = ("inputs", "devices and compilers", "pipelines", "interruptions", "long runs")
SCHEMA = 1
_INPUTS = "inputs tried"
_PROPERTY = "survives"


def survives(area: str, fault: str) -> pytest.MarkDecorator:
    """A mark for a test; nearer ones go before those of a class or a module.

    Args:
        area: one of ``AREAS``.
        fault: what is put in, in a few words: ``"NaN in one sample"``.
    """
    if area not in AREAS:
        raise ValueError(f"area must be one of {', '.join(AREAS)}, got {area!r}")
    return pytest.mark.survives(area=area, fault=fault)


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Count inputs that a test has tried."""

    def count(inputs: int = 1) -> None:
        request.node.user_properties.append((_INPUTS, inputs))

    return count


def fault_of(item: pytest.Item) -> dict[str, str] | None:
    """Area and fault of a test's nearest mark; None without one.

    Raises:
        pytest.UsageError: for a mark that was not made by :func:`survives`.
    """
    mark = item.get_closest_marker(_PROPERTY)
    if mark is None:
        return None
    if mark.args or set(mark.kwargs) != {"area", "fault"} or mark.kwargs["area"] not in AREAS:
        raise pytest.UsageError(f"{item.nodeid} has a mark that reliability.survives(area, fault) did not make")
    return {"area": mark.kwargs["area"], "fault": mark.kwargs["fault"]}


class Outcomes:
    """The outcomes of the tests of a run that survive something.

    Args:
        path: of the file to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test's worst phase, the time of all of them, and what it counted."""
        told = dict(report.user_properties).get(_PROPERTY)
        if told is None:
            return
        row = self._found.setdefault(
            report.nodeid, {**told, "inputs": 0, "outcome": "", "reason": "", "seconds": 0.0, "test": report.nodeid}
        )
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        if report.when == "call" and not report.skipped:
            row["inputs"] = sum(value for name, value in report.user_properties if name == _INPUTS) or 1
        if (report.when == "call" or not report.passed) and row["outcome"] != "failed":
            row |= {"outcome": report.outcome, "reason": reason_of(report)}

    def pytest_sessionfinish(self) -> None:
        """Write them, with device, versions and commit."""
        import torch

        from segkern.core.environment import environment

        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        packages = "triton", "numpy", "diffusers", "transformers", "hypothesis"
        found = environment(device, *packages) | {"device_type": device.type}
        del found["threads"]
        write(
            self._path,
            {"schema": SCHEMA, "environment": found, "tests": [self._found[test] for test in sorted(self._found)]},
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", metavar="FILE", help="write what became of the tests that survive something")


def pytest_configure(config: pytest.Config) -> None:
    note(config, "--reliability", Outcomes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every report of a test carries what the test survives, also from another process."""
    for item in items:
        fault = fault_of(item)
        if fault is not None:
            item.user_properties.append((_PROPERTY, fault))
