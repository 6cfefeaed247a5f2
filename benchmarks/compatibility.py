# SPDX-License-Identifier: Apache-2.0
"""On which models and in which tasks guidance is proved to work, with which diffusers: tests run, outcomes kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.results import RESULTS

FOLDER = RESULTS / "compatibility"
SCHEMA = 1
_ROOT = Path(__file__).parents[1]


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
    paths = [str(folder.resolve())] if folder is not None else []
    paths += [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "proves", "-n", jobs, "--dist", "worksteal"]
        ran = subprocess.run([*command, "--compatibility", str(written), "tests"], cwd=_ROOT, env=environment)
        if not written.exists():
            raise ValueError(f"no test that proves anything has run; pytest ended with {ran.returncode}")
        found = read(written)
        text = written.read_text(encoding="utf-8")
    version = found["environment"]["diffusers"]
    if folder is not None and not (folder / f"diffusers-{version}.dist-info").is_dir():
        raise ValueError(f"the tests ran with diffusers {version}, which is not the one in {str(folder)!r}")
    commit = machine.described(torch.device("cpu"))["commit"]  # not marked where only results differ
    text = text.replace(json.dumps(found["environment"]["commit"]), json.dumps(commit), 1)
    found["environment"]["commit"] = commit
    path = out or FOLDER / f"{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path, found, ran.returncode


def read(path: Path) -> dict[str, Any]:
    """A file of outcomes.

    Raises:
        ValueError: for a file of another schema.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{str(path)!r} has schema {found.get('schema')!r}, and this reads {SCHEMA}")
    return found


def committed() -> dict[str, dict[str, Any]]:
    """Every committed file by its version of diffusers, the oldest first."""
    found = [read(path) for path in FOLDER.glob("*.json")]
    versions = {each["environment"]["diffusers"]: each for each in found}
    return {version: versions[version] for version in sorted(versions, key=_numbers)}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
