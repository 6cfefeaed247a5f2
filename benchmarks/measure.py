# SPDX-License-Identifier: Apache-2.0
"""Measure the cases of a suite on a device. Every provider is checked first, and only correct results are timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks import checks, machine, timing
from benchmarks.cases import ON_A_CPU, REAL, Case, Inputs
from benchmarks.providers import Call, Provider
from benchmarks.results import Row, describe_case

Rounds = Callable[[Case], int]


def usual_cases(device: torch.device) -> tuple[str, ...]:
    """Return the names of the default cases of a device."""
    return ON_A_CPU if device.type == "cpu" else REAL


def usual_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the default dtypes of a device."""
    return (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16, torch.float32)


def usual_rounds(device: torch.device) -> Rounds:
    """Return a function that gives the number of rounds of a case. A CPU takes up to a second for one call."""
    if device.type == "cuda":
        return lambda case: 50 if case.tokens <= 5000 else 20
    return lambda case: 15 if case.tokens <= 1024 else 7


def measure(
    case: Case, sigmas: Sequence[float], providers: Sequence[Provider], device: torch.device, rounds: int
) -> Iterator[list[Row]]:
    """Yield the rows of one case, a list per sigma. All providers are timed in the same rounds."""
    inputs = case.inputs(device)
    unblurred = checks.expected(inputs, 0.0, "plain")
    for sigma in sigmas:
        yield _measure_sigma(inputs, sigma, providers, rounds, unblurred)


def _measure_sigma(
    inputs: Inputs, sigma: float, providers: Sequence[Provider], rounds: int, unblurred: checks.Expected
) -> list[Row]:
    wanted = {"plain": unblurred}
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    for provider in providers:
        if provider.kind not in wanted:
            wanted[provider.kind] = checks.expected(inputs, sigma, provider.kind)
        row, call = _judged(provider, inputs, sigma, wanted[provider.kind])
        rows[provider.name] = row
        if call is not None:
            calls[provider.name] = call
    no_graph = {provider.name: provider.no_graph for provider in providers if provider.no_graph is not None}
    samples, missing = timing.time_calls(calls, inputs.device, rounds, no_graph)
    clock = timing.headline(inputs.device)
    plain = [provider.name for provider in providers if provider.kind == "plain" and provider.name in samples]
    fastest = min(plain, key=lambda name: statistics.median(samples[name][clock]), default=None)
    for name, row in rows.items():
        if name not in samples:
            continue
        for which in timing.CLOCKS:
            values = samples[name].get(which)
            row[f"{which}_ms"] = missing[name][which] if values is None else timing.spread(values)
        row |= {
            "rounds": len(samples[name][clock]),
            "peak_mib": timing.peak_mib(calls[name], inputs.device),
        }
        if row["kind"] in ("plain", "attention"):
            row["tflops"] = inputs.case.attention_flops / row[f"{clock}_ms"]["median"] / 1e9
        if fastest is not None:
            pairs = zip(samples[name][clock], samples[fastest][clock], strict=False)  # slow calls have fewer rounds
            row |= {"ratio": timing.spread(mine / its for mine, its in pairs), "ratio_to": fastest}
    return list(rows.values())


def _judged(provider: Provider, inputs: Inputs, sigma: float, wanted: checks.Expected) -> tuple[Row, Call | None]:
    """Return a row without times, and the call to time, or None if the row has a reason not to time it."""
    row: Row = describe_case(inputs.case) | {
        "sigma": f"{sigma:g}",
        "provider": provider.name,
        "kind": provider.kind,
        "exact": provider.exact,
        "error": None,
        **dict.fromkeys(("reason", "rounds", "ratio", "ratio_to", "tflops", "peak_mib")),
        **{f"{clock}_ms": None for clock in timing.CLOCKS},
    }
    row["reason"] = provider.why_not(inputs, sigma) or _too_large(provider, inputs)
    if row["reason"] is not None:
        return row, None
    try:
        call = provider.make(inputs, sigma)
        result = call()
        errors, wrong = checks.judge(provider, result, inputs, wanted)
    except Exception as error:  # a backend or compiler can raise anything; the error goes into the row
        row["reason"] = timing.first_line(error)
        return row, None
    row["error"] = errors or None
    if wrong:
        row["reason"] = wrong
        return row, None
    return row, call


def _too_large(provider: Provider, inputs: Inputs) -> str | None:
    """Return a message if a provider needs over half of the free memory, which could kill a CPU process, or None."""
    needs, free = provider.scratch(inputs.case), machine.free_memory(inputs.device)
    if needs <= 0.5 * free:
        return None
    return f"it allocates {needs / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
