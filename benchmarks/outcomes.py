# SPDX-License-Identifier: Apache-2.0
"""Tests of one mark run in a process of their own, and the file of what became of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine

_ROOT = Path(__file__).parents[1]


def run(mark: str, option: str, jobs: str, folders: Sequence[str] = ()) -> tuple[str, dict[str, Any], int]:
    """Run the tests of a mark.

    Args:
        mark: of the tests.
        option: of pytest, which names the file that outcomes go to.
        jobs: processes, as pytest-xdist takes them.
        folders: to import from before others.

    Returns:
        The file's text, what is in it, and pytest's exit code.

    Raises:
        ValueError: when there was nothing to write.
    """
    paths = [*folders, str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", mark, "-n", jobs, "--dist", "worksteal"]
        ran = subprocess.run([*command, option, str(written), "tests"], cwd=_ROOT, env=environment)
        text = written.read_text(encoding="utf-8") if written.exists() else "{}"
    found: dict[str, Any] = json.loads(text)
    if not found.get("tests"):
        raise ValueError(f"no test that {mark} anything has run; pytest ended with {ran.returncode}")
    commit = machine.described(torch.device("cpu"))["commit"]  # not marked where only results differ
    text = text.replace(json.dumps(found["environment"]["commit"]), json.dumps(commit), 1)
    found["environment"]["commit"] = commit
    return text, found, ran.returncode


def write(path: Path, text: str) -> None:
    """The file, in a folder that may be missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def read(path: Path, schema: int) -> dict[str, Any]:
    """A file of outcomes.

    Raises:
        ValueError: for a file of another schema.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("schema") != schema:
        raise ValueError(f"{str(path)!r} has schema {found.get('schema')!r}, and this reads {schema}")
    return found
