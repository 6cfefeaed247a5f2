# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.releases``: the tests with another Python, torch or Triton, and what became of them."""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import machine
from benchmarks.outcomes import read as read_outcomes
from benchmarks.refusals import refusing
from benchmarks.results import RESULTS

FOLDER = RESULTS / "releases"
SCHEMA = 1
PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "accelerate", "safetensors", "pillow", "gradio")
# The tests that kernels, operators and the compiler can break; the others are about pipelines, commands and pages.
KERNELS = (
    "tests/kernels/test_kernels.py",
    "tests/kernels/test_kernel_choices.py",
    "tests/core/test_ops.py",
    "tests/kernels/test_compile.py",
    "tests/core/test_seg_attention.py",
    "tests/test_attention_*.py",
    "tests/core/test_gaussian.py",
    "tests/core/test_coarse_queries.py",
    "tests/core/test_frames.py",
    "tests/diffusers/test_compile.py",
    "tests/test_benchmarks*.py",
)
# Operators, gradients and torch.compile with both backends, and the kernels' choices: in a few minutes.
OPERATORS = (
    "tests/core/test_ops.py",
    "tests/kernels/test_compile.py",
    "tests/kernels/test_kernel_choices.py",
    "tests/core/test_frames.py",
)
SETS = {"all": ("tests",), "kernels": KERNELS, "operators": OPERATORS}
_ROOT = Path(__file__).parents[1]
# Asked of the interpreter that runs the tests; versions are those it imports, not what metadata lies about.
_ASK = f"""
import importlib.metadata, json, platform
import segkern, torch
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
found = {{name: version(name) for name in {PACKAGES!r}}} | {{"torch": torch.__version__}}
print(json.dumps({{
    "segkern_file": segkern.__file__, "python": platform.python_version(),
    "platform": f"{{platform.system()}} {{platform.machine()}}", **found, "segkern": segkern.__version__,
}}))
"""


def run(python: Path, tests: str = "all", folder: Path | None = None, jobs: str = "1") -> tuple[Path, dict[str, Any]]:
    """Run the unmarked tests of this checkout with an interpreter and write what became of them.

    Args:
        python: an interpreter that has what ``segkern[all]`` needs.
        tests: ``"all"``, ``"kernels"``, what kernels and the compiler can break, or ``"operators"``, a part of that.
        folder: with packages that go before the interpreter's own, by ``pip install --target``.
        jobs: processes, as pytest-xdist takes them.

    Returns:
        The file and what is in it.

    Raises:
        ValueError: when the interpreter lacks something, imports another segkern, or pytest wrote nothing.
    """
    if tests not in SETS:
        raise ValueError(f"--tests takes {', '.join(SETS)}, got {tests!r}")
    paths = [str(folder.resolve())] if folder is not None else []
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    surroundings["PYTHONPATH"] = os.pathsep.join([*paths, str(_ROOT)])
    asked = subprocess.run([python, "-c", _ASK], cwd=_ROOT, env=surroundings, capture_output=True, text=True)
    if asked.returncode != 0:
        reason = asked.stderr.strip().rpartition("\n")[2] or f"exit code {asked.returncode}"
        raise ValueError(f"{str(python)!r} cannot import segkern and torch: {reason}")
    environment = json.loads(asked.stdout)
    if not Path(environment.pop("segkern_file")).is_relative_to(_ROOT):
        raise ValueError(f"{str(python)!r} imports a segkern that is not this checkout's")
    environment["commit"] = machine.described(torch.device("cpu"))["commit"]
    files = [name for pattern in SETS[tests] for name in sorted(glob.glob(pattern, root_dir=_ROOT))]
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "outcomes.xml"
        options = ["-q", "-p", "no:cacheprovider", "-n", jobs, "--junit-xml", str(written)]
        ran = subprocess.run([python, "-m", "pytest", *options, *files], cwd=_ROOT, env=surroundings)
        if not written.exists():
            raise ValueError(f"pytest ended with {ran.returncode} and wrote nothing")
        found = {"schema": SCHEMA, "environment": environment, "tests": tests, **outcomes(written)}
    parts = (
        f"python-{'.'.join(environment['python'].split('.')[:2])}",
        *(f"{name}-{environment[name].replace('+', '-')}" for name in ("torch", "triton")),
    )
    path = FOLDER / f"{'-'.join(parts)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path, found


def outcomes(path: Path) -> dict[str, Any]:
    """What a JUnit file of pytest says: counts, seconds, each failure, and why tests were skipped."""
    counts = {"passed": 0, "failed": 0, "skipped": 0, "expected to fail": 0}
    failures: list[dict[str, str]] = []
    skips: dict[str, int] = {}
    root = ElementTree.parse(path).getroot()
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if bad is not None:
            counts["failed"] += 1
            failures.append({"test": name, "reason": (bad.get("message") or "").splitlines()[0]})
        elif skipped is None:
            counts["passed"] += 1
        elif skipped.get("type") == "pytest.xfail":
            counts["expected to fail"] += 1
        else:
            counts["skipped"] += 1
            reason = skipped.get("message") or ""
            skips[reason] = skips.get(reason, 0) + 1
    seconds = sum(float(suite.get("time", 0)) for suite in root.iter("testsuite"))
    return {"counts": counts, "seconds": round(seconds), "failures": failures, "skips": dict(sorted(skips.items()))}


def committed() -> list[dict[str, Any]]:
    """Every committed file of tests, by Python, torch and triton.

    Raises:
        ValueError: for a file of another schema.
    """
    return sorted(
        map(read, FOLDER.glob("python-*.json")),
        key=lambda each: [_numbers(each["environment"][name]) for name in ("python", "torch", "triton")],
    )


def committed_extras() -> list[dict[str, Any]]:
    """Every committed file of ``tests/project/release/extras.py``, by Python.

    Raises:
        ValueError: for a file of another schema.
    """
    return sorted(map(read, FOLDER.glob("extras-*.json")), key=lambda each: _numbers(each["environment"]["python"]))


def read(path: Path) -> dict[str, Any]:
    """A file of outcomes.

    Raises:
        ValueError: for a file of another schema.
    """
    return read_outcomes(path, SCHEMA)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdecimal())


def main(
    python: Annotated[
        Path, typer.Option(help="Interpreter with what segkern[all] needs; this one if not given.")
    ] = Path(sys.executable),
    tests: Annotated[str, typer.Option(help="all, kernels or operators; see SETS in this file.")] = "all",
    folder: Annotated[
        Path | None, typer.Option(help="Packages that go before its own, by pip install --no-deps --target.")
    ] = None,
    jobs: Annotated[str, typer.Option(help="Processes: a number or auto.")] = "1",
) -> None:
    """Run the tests with an interpreter and write what became of them; a failure is exit code 1."""
    with refusing():
        path, found = run(python, tests, folder, jobs)
    typer.echo(", ".join(f"{count} {outcome}" for outcome, count in found["counts"].items()))
    typer.echo(f"wrote {path}")
    if found["failures"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
