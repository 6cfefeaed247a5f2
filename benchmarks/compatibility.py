# SPDX-License-Identifier: Apache-2.0
"""Run the tests that check guidance on real model architectures with a version of diffusers, and save the outcomes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.results import RESULTS, read_json

FOLDER = RESULTS / "compatibility"
SCHEMA = 1
GUIDANCES = ("SEG", "SEG at infinity", "PAG", "SAG", "SLG", "TPG", "CFG")
_ROOT = Path(__file__).parents[1]


def run(folder: Path | None = None, out: Path | None = None, jobs: str = "0") -> tuple[Path, dict[str, Any], int]:
    """Run the tests marked ``proves`` in a separate process.

    Args:
        folder: Folder with another diffusers from ``pip install --no-deps --target``. Default: the installed one.
        out: File to write. Default: ``benchmarks/results/compatibility/<version>.json``.
        jobs: Number of processes, in the format of pytest-xdist.

    Returns:
        The file, its content, and pytest's exit code.

    Raises:
        ValueError: If no test ran, or the tests ran with another diffusers than the one in the folder.
    """
    folders = [] if folder is None else [str(folder.resolve())]
    paths = [*folders, str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "proves", "-n", jobs, "--dist", "worksteal"]
        ran = subprocess.run([*command, "--compatibility", str(written), "tests"], cwd=_ROOT, env=environment)
        text = written.read_text(encoding="utf-8") if written.exists() else "{}"
    outcomes: dict[str, Any] = json.loads(text)
    if not outcomes.get("tests"):
        raise ValueError(f"no test marked proves ran; pytest ended with exit code {ran.returncode}")
    version = outcomes["environment"]["diffusers"]
    if folder is not None and not (folder / f"diffusers-{version}.dist-info").is_dir():
        raise ValueError(f"the tests ran with diffusers {version}, which is not the one in {str(folder)!r}")
    commit = machine.described(torch.device("cpu"))["commit"]  # not marked dirty if only results differ
    text = text.replace(json.dumps(outcomes["environment"]["commit"]), json.dumps(commit), 1)
    outcomes["environment"]["commit"] = commit
    path = out or FOLDER / f"{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path, outcomes, ran.returncode


def read(path: Path) -> dict[str, Any]:
    """Read a file of outcomes.

    Raises:
        ValueError: If the file has another schema.
    """
    file = read_json(path)
    if file.get("schema") != SCHEMA:
        raise ValueError(f"{str(path)!r} has schema {file.get('schema')!r}, expected {SCHEMA}")
    return file


def committed() -> dict[str, dict[str, Any]]:
    """Return every committed file by its version of diffusers, oldest first."""
    files = [read(path) for path in FOLDER.glob("*.json")]
    files.sort(key=lambda file: [int(part) for part in file["environment"]["diffusers"].split(".") if part.isdecimal()])
    return {file["environment"]["diffusers"]: file for file in files}


def outcome(file: Mapping[str, Any], group: str, model: str, task: str, guidance: str) -> str:
    """Return the outcome of a guidance method on a model and task: all tests passed, one failed, or none ran."""
    tests = [
        test
        for test in file["tests"]
        if (test["group"], test["model"], test["task"]) == (group, model, task) and guidance in test["guidance"]
    ]
    failed = next((test for test in tests if test["outcome"] == "failed"), None)
    if failed is not None:
        return f"**no**: {_cell(failed['reason'])}"
    if any(test["outcome"] == "passed" for test in tests):
        return "yes"
    return f"not tested: {_cell(tests[0]['reason'])}" if tests else "not tested"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")
