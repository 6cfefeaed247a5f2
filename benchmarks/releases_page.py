# SPDX-License-Identifier: Apache-2.0
"""``docs/releases.md``: with which versions the tests ran, and what each extra of the wheel was used for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.releases import SETS
from benchmarks.tables import markdown

_INTRODUCTION = """\
# Tested with

`python -m benchmarks.readme` writes this page from `benchmarks/results/releases/`, which
`python -m benchmarks.releases` writes from what ran; no cell is typed by hand.
[docs/models.md](models.md) has models and versions of diffusers, [docs/compiled.md](compiled.md) the targets that
kernels are compiled for."""

_TESTS = """\
## Versions

The unmarked tests of a commit, with the interpreter and packages of a row; a row says nothing of tests that it does not
name. There was no GPU: kernels ran in Triton's interpreter. A torch with `+cu` is the CUDA build of the package index,
on the CPU. A commit that this history does not have was rebased later. In the column of tests, *all* are those that
`make test` runs, *operators* {operators}, and *kernels*
{kernels}."""

_EXTRAS = """\
## Extras

The wheel with an extra, installed by pip with `constraints.txt` into an environment without anything else, and used in
an empty folder outside of the checkout. `pip check` passed wherever an installation did."""


def page(files: Sequence[Mapping[str, Any]], extras: Sequence[Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        files: of ``benchmarks.releases``, in their order.
        extras: of ``tests/project/release/extras.py``, by Python.
    """
    sets = {name: ", ".join(f"`{pattern}`" for pattern in patterns) for name, patterns in SETS.items()}
    parts = [_INTRODUCTION, _TESTS.format(**sets)]
    if files:
        headings = ("Python", "torch", "triton", "numpy", "diffusers", "transformers", "tests", "passed", "failed")
        parts.append(markdown((*headings, "skipped", "commit"), [_line(each) for each in files], "---"))
        parts += _reasons(files)
    else:
        parts.append("Nothing has run yet.")
    parts.append(_EXTRAS)
    for each in extras:
        environment = each["environment"]
        headings = ("environment", "packages", "what was done", "outcome")
        rows = [_environment(row) for row in each["extras"]]
        parts += [
            f"Python {environment['python']}, {environment['platform']}, commit `{environment['commit']}`:",
            markdown(headings, rows, "---"),
        ]
    if not extras:
        parts.append("Nothing has run yet.")
    return "\n\n".join(parts) + "\n"


def _line(each: Mapping[str, Any]) -> list[str]:
    environment, counts = each["environment"], each["counts"]
    versions = [environment[name] for name in ("python", "torch", "triton", "numpy", "diffusers", "transformers")]
    failed = f"**{counts['failed']}**" if counts["failed"] else "0"
    skipped = counts["skipped"] + counts["expected to fail"]
    return [*versions, each["tests"], str(counts["passed"]), failed, str(skipped), f"`{environment['commit']}`"]


def _reasons(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Failures, and why tests were skipped."""
    parts = []
    failures = [
        f"- Python {each['environment']['python']}, torch {each['environment']['torch']}, triton "
        f"{each['environment']['triton']}: `{one['test']}`: {' '.join(one['reason'].split())}"
        for each in files
        for one in each["failures"]
    ]
    if failures:
        parts += ["Failed:", "\n".join(failures)]
    skips: dict[str, int] = {}
    for each in files:
        for reason, count in each["skips"].items():
            skips[reason] = max(count, skips.get(reason, 0))
    if skips:
        lines = [f"- {reason} (up to {count} in a row)" for reason, count in sorted(skips.items())]
        parts += ["Skipped, because:", "\n".join(lines)]
    return parts


def _environment(row: Mapping[str, Any]) -> list[str]:
    failures = row["failures"]
    told = "; ".join(f"{what}: {' '.join(reason.split())[:200]}" for what, reason in failures.items())
    outcome = f"**failed**: {told}".replace("|", "\\|") if failures else "works"
    return [row["name"], str(len(row["packages"])), "; ".join(row["uses"]), outcome]
