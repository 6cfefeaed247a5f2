# SPDX-License-Identifier: Apache-2.0
"""What faults and how many inputs the package is proved to survive: tests run, outcomes kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import machine, outcomes
from benchmarks.results import RESULTS

FOLDER = RESULTS / "reliability"
SCHEMA = 1


def run(out: Path | None = None, jobs: str = "0") -> tuple[Path, dict[str, Any], int]:
    """Run the tests that survive something, in a process of their own.

    Args:
        out: the file to write; ``benchmarks/results/reliability/<processor>.json`` if not given.
        jobs: processes, as pytest-xdist takes them.

    Returns:
        The file, what is in it, and pytest's exit code.

    Raises:
        ValueError: when there was nothing to write.
    """
    text, found, code = outcomes.run("survives", "--reliability", jobs)
    path = out or FOLDER / f"{machine.slug(found['environment']['device'])}.json"
    outcomes.write(path, text)
    return path, found, code


def committed() -> dict[str, dict[str, Any]]:
    """Every committed file by its stem."""
    return {path.stem: outcomes.read(path, SCHEMA) for path in sorted(FOLDER.glob("*.json"))}


def summary(found: dict[str, Any]) -> str:
    """How many tests and inputs, in one line."""
    tests = found["tests"]
    survived = sum(test["outcome"] == "passed" for test in tests)
    skipped = sum(test["outcome"] == "skipped" for test in tests)
    inputs = sum(test["inputs"] for test in tests)
    rest = f", {skipped} skipped" if skipped else ""
    return f"{survived} of {len(tests) - skipped} tests survived{rest}; {inputs:,} inputs tried"
