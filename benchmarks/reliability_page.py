# SPDX-License-Identifier: Apache-2.0
"""``docs/reliability.md``: the faults that were put in and the inputs that were tried, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.reliability import summary
from benchmarks.tables import markdown

_Files = Mapping[str, Mapping[str, Any]]

_INTRODUCTION = """\
# Reliability

`python -m benchmarks.readme` writes this page from `benchmarks/results/reliability/`, which
`python -m benchmarks reliability` writes from the outcomes of tests; no number is typed by hand. `make robustness` runs
the same tests, and so does CI.

Each test puts one kind of fault, or many inputs, to the package: functions and kernels, guided pipelines, commands. An
input is one call, or one run of a pipeline, whose result the test has checked. Results are held to the reference in
float64 under the numerics contract (an error of at most twice that of plain PyTorch at the input's dtype, plus one unit
of rounding; of random inputs in float32 and float64, a few roundings of the largest logit will do too), or must equal,
bit for bit, those of a run without the fault; where an input cannot be served, the error must name
what is wrong with it."""

_ON_A_CPU = """\
Not tried there, for want of a CUDA device: kernels as compiled code (here they run in Triton's interpreter, and
`tests/kernels/test_compile.py` compiles them without running them), bfloat16 in the kernels, several CUDA streams at
once, CUDA
graphs beside each other, and a device that is really out of memory; running out of memory and failures of Triton's
compiler are put in by raising what PyTorch and Triton raise."""

_AREAS = ("inputs", "devices and compilers", "pipelines", "interruptions", "long runs")


def page(files: _Files) -> str:
    """The whole page.

    Args:
        files: of ``benchmarks.reliability``, by their stems.
    """
    parts = [_INTRODUCTION]
    for found in files.values():
        env = found["environment"]
        versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "triton", "diffusers", "transformers"))
        parts += [
            f"## {env['device']}",
            f"{summary(dict(found))}. {versions}, Python {env['python']}, commit `{env['commit']}`.",
            markdown(("area", "fault", "inputs tried", "tests survived"), lines(found["tests"]), "---"),
            *_unhappy(found["tests"]),
        ]
        if env["device_type"] == "cpu":
            parts.append(_ON_A_CPU)
    return "\n\n".join(parts if files else [*parts, "Nothing has run yet."]) + "\n"


def lines(tests: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each fault, and one for all."""
    faults: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for test in sorted(tests, key=lambda test: (_place(test["area"]), test["fault"])):
        faults.setdefault((test["area"], test["fault"]), []).append(test)
    rows = [[area, fault, *_counts(some)] for (area, fault), some in faults.items()]
    return [*rows, ["all", "", *_counts(tests)]]


def _counts(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    passed = sum(test["outcome"] == "passed" for test in tests)
    run = sum(test["outcome"] != "skipped" for test in tests)
    return [f"{sum(test['inputs'] for test in tests):,}", f"{passed} of {run}" if run else "not run"]


def _unhappy(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """What failed and what was skipped, with reasons."""
    found = []
    for outcome, heading in (("failed", "Failed:"), ("skipped", "Skipped:")):
        some = [f"- `{test['test']}`: {test['reason']}" for test in tests if test["outcome"] == outcome]
        if some:
            found.append("\n".join([heading, "", *some]))
    return found


def _place(area: str) -> int:
    return _AREAS.index(area) if area in _AREAS else len(_AREAS)
