# SPDX-License-Identifier: Apache-2.0
"""On which models and in which tasks guidance is proved to work, with which diffusers: tests run, outcomes kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import outcomes
from benchmarks.results import RESULTS

FOLDER = RESULTS / "compatibility"
SCHEMA = 1


def run(folder: Path | None = None, out: Path | None = None, jobs: str = "0") -> tuple[Path, dict[str, Any], int]:
    """Run the tests that prove something, in a process of their own.

    Args:
        folder: with another diffusers, installed by ``pip install --no-deps --target``; the installed one if not given.
        out: the file to write; ``benchmarks/results/compatibility/<version>.json`` if not given.
        jobs: processes, as pytest-xdist takes them.

    Returns:
        The file, what is in it, and pytest's exit code.

    Raises:
        ValueError: when there was nothing to write, or the tests ran with another diffusers than the folder's.
    """
    folders = [] if folder is None else [str(folder.resolve())]
    text, found, code = outcomes.run("proves", "--compatibility", jobs, folders)
    version = found["environment"]["diffusers"]
    if folder is not None and not (folder / f"diffusers-{version}.dist-info").is_dir():
        raise ValueError(f"the tests ran with diffusers {version}, which is not the one in {str(folder)!r}")
    path = out or FOLDER / f"{version}.json"
    outcomes.write(path, text)
    return path, found, code


def read(path: Path) -> dict[str, Any]:
    """A file of outcomes.

    Raises:
        ValueError: for a file of another schema.
    """
    return outcomes.read(path, SCHEMA)


def committed() -> dict[str, dict[str, Any]]:
    """Every committed file by its version of diffusers, the oldest first."""
    found = [read(path) for path in FOLDER.glob("*.json")]
    versions = {each["environment"]["diffusers"]: each for each in found}
    return {version: versions[version] for version in sorted(versions, key=_numbers)}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
