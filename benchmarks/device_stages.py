# SPDX-License-Identifier: Apache-2.0
"""Stages of ``python -m benchmarks device`` that have no command in ``python -m benchmarks``."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import torch.nn.functional as F
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks import checks, machine, tune
from benchmarks.cases import CASES, SDXL, TINY, Case, Inputs, select
from benchmarks.providers import BLURS, PROVIDERS, Call, find_providers
from benchmarks.results import read_json, write_json
from benchmarks.timing import first_line
from segkern.core.environment import version_of
from segkern.generation.loading import find_device

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_PACKAGES = ("diffusers", "importlib_metadata", "transformers", "pytest", "pytest-xdist", "hypothesis")
_SIGMAS = (1.0, 3.0, 10.0, math.inf)
_REPEATS = 500
_TESTS = ["tests/kernels", "tests/core", "tests/project/test_benchmarks.py"]
_TESTS_OF_GUIDANCE = ["tests/diffusers/test_compile.py", "tests/project/test_benchmarks_steps.py"]
_QUICK_TESTS = ["tests/kernels/test_offsets.py"]
_ROOT = Path(__file__).parents[1]

Out = Annotated[Path, typer.Option(help="JSON file to write.")]
Cases = Annotated[str, typer.Option(help="Case names, comma-separated.")]
Quick = Annotated[bool, typer.Option("--quick", help="Run as little as possible, on a CPU.")]


def _chosen(cases: str, quick: bool) -> list[Case]:
    """Return cases in half precision. The interpreter computes wrong bfloat16 products."""
    names = select("--cases", cases.split(","), list(CASES))
    return [CASES[name].of(torch.float16 if quick else torch.bfloat16) for name in names]


@app.command()
def environment(out: Out, quick: Quick = False) -> None:
    """Write device and versions, and the backend that PyTorch's attention uses for SDXL's layers."""
    device = find_device("cpu" if quick else "auto")
    result: dict[str, Any] = machine.described(device) | {name: version_of(name) for name in _PACKAGES}
    result |= {"cores": os.cpu_count(), "free_gib": machine.free_memory(device) / 2**30, "attention": []}
    for name, dtype in itertools.product(TINY if quick else SDXL, (torch.bfloat16, torch.float16)):
        inputs = CASES[name].of(dtype).inputs(device)
        chosen = attention_backend(inputs)
        result["attention"].append({"case": inputs.case.name, "dtype": inputs.case.dtype_name, "backend": chosen})
        write_json(out, result)
        print(name, dtype, chosen)


def attention_backend(inputs: Inputs) -> str:
    """Return the operator that PyTorch's attention runs for such inputs. Its name contains the backend."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)
    names = [event.key for event in profiled.key_averages() if event.key.startswith("aten::_scaled_dot_product_")]
    return names[0].removeprefix("aten::_scaled_dot_product_") if names else "not known"


@app.command()
def compilation(
    cases: Cases,
    quick: Quick = False,
    share: Annotated[int | None, typer.Option(help="Number of this process. Default: start all processes.")] = None,
    of: Annotated[int, typer.Option(help="Number of processes; 0 for the number of cores.")] = 0,
) -> None:
    """Call everything that is timed later once, on all cores, so compilers cache their output on disk."""
    of = of or (2 if quick else os.cpu_count() or 1)
    if share is None:
        again = [sys.executable, "-m", "benchmarks.device_stages", "compilation", "--cases", cases, "--of", str(of)]
        again += ["--quick"] * quick
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen([*again, "--share", str(i)], cwd=_ROOT, env=variables) for i in range(of)]
        codes = [process.wait() for process in processes]
        raise typer.Exit(any(codes))
    device = find_device("cpu" if quick else "auto")
    start, called = time.perf_counter(), 0
    for name, call in itertools.islice(_to_compile(_chosen(cases, quick), device, quick), share, None, of):
        called += 1
        try:
            call()
        except Exception as error:  # a compiler can raise anything; the timing stage records the error in a row
            print(f"{name}: {first_line(error)}")
    print(f"process {share}: {called} calls in {time.perf_counter() - start:.0f} s")


def _to_compile(cases: list[Case], device: torch.device, quick: bool) -> Iterator[tuple[str, Call]]:
    """Yield all calls of the attention suite and of tuning, by name."""
    for case in cases:
        inputs = case.inputs(device)
        ways = find_providers("attention", [*BLURS, "auto"] if quick else ())
        for provider in (way for way in ways if way.kind != "plain"):
            for sigma in (1.0, 10.0, math.inf):
                if (quick and math.isfinite(sigma)) or provider.why_not(inputs, sigma) is None:
                    yield f"{case.name}, {provider.name}, sigma {sigma:g}", _made(provider.name, inputs, sigma)
        tiles = tune.candidates(case, device)[: 2 if quick else None]
        yield from tune.tile_calls(inputs, 10.0, tiles, device).items()


def _made(name: str, inputs: Inputs, sigma: float) -> Call:
    return lambda: PROVIDERS[name].make(inputs, sigma)()


@app.command()
def blur(
    way: Annotated[str, typer.Option(help="Name of a provider.")], out: Out, cases: Cases, quick: Quick = False
) -> None:
    """Check one way to blur queries before attention against float64, then repeat it often to find hangs and races."""
    device = find_device("cpu" if quick else "auto")
    result: dict[str, Any] = read_json(out) if out.exists() else {"environment": machine.described(device), "rows": []}
    right = True
    for case in [*_chosen(cases, quick), *([] if quick else [CASES["sdxl-26x38"].of(torch.bfloat16)])]:
        inputs = case.inputs(device)
        for sigma in _SIGMAS:
            if way in BLURS and math.isinf(sigma):
                continue  # other kernels compute the mean
            row: dict[str, Any] = {"way": way, "case": case.name, "dtype": case.dtype_name, "sigma": f"{sigma:g}"}
            row |= _held(way, inputs, sigma, 2 if quick else _REPEATS)
            result["rows"].append(row)
            write_json(out, result)
            print(row)
            right &= row["reason"] is None
    raise typer.Exit(not right)


def _held(way: str, inputs: Inputs, sigma: float, repeats: int) -> dict[str, Any]:
    """Return the errors of a result, and the reason why it is wrong, fails, or changes between calls."""
    row: dict[str, Any] = {"error": None, "reason": None, "repeats": repeats}
    try:
        call = PROVIDERS[way].make(inputs, sigma)
        first = call()
        wanted = checks.expected(inputs, sigma, "attention")
        row["error"], wrong = checks.judge(PROVIDERS[way], first, inputs, wanted)
        changed = sum(not torch.equal(call(), first) for _ in range(repeats))
    except Exception as error:  # a compiler or device can raise anything; the error goes into the row
        return row | {"reason": first_line(error)}
    if not wrong and changed:
        wrong = f"{changed} of {repeats} more calls gave another result"
    return row | {"reason": wrong or None}


class _Outcomes:
    """Test counts and failure messages, written while tests run."""

    def __init__(self, path: Path, result: dict[str, Any]) -> None:
        self._path = path
        self._result = result | {"complete": False, "passed": 0, "failed": 0, "skipped": 0, "failures": []}
        self._written = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the end of a test. A failing fixture is a failure too."""
        if report.passed and report.when != "call":
            return
        self._result[report.outcome] += 1
        if report.failed:
            self._result["failures"].append({"test": report.nodeid, "message": report.longreprtext[-1500:]})
        if report.failed or time.monotonic() > self._written + 2:
            self._write()

    def pytest_sessionfinish(self) -> None:
        """Record that the session is complete."""
        self._result["complete"] = True
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        write_json(self._path, self._result)


@app.command("tests")
def run_tests(out: Out, quick: Quick = False) -> None:
    """Run the tests that compute on a CUDA device, on most cores."""
    jobs = 2 if quick else max(1, min(12, (os.cpu_count() or 1) - 2))
    arguments = ["-q", "-m", "cuda and not slow and not robustness", "-n", str(jobs), "--dist", "worksteal"]
    # The device may have untested package versions, whose warnings are not failures.
    arguments += ["-p", "no:cacheprovider", "--maxfail", "40", "-W", "default"]
    where = _QUICK_TESTS if quick else _TESTS
    if importlib.util.find_spec("diffusers") is not None and not quick:
        where = where + _TESTS_OF_GUIDANCE
    os.environ["OMP_NUM_THREADS"] = "1"
    described = {"environment": machine.described(find_device("cpu" if quick else "auto"))}
    raise typer.Exit(int(pytest.main([*arguments, *where], plugins=[_Outcomes(out, described)])))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.device_stages")
