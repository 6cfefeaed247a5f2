# SPDX-License-Identifier: Apache-2.0
"""From a suite, cases and a device to rows: every provider is judged first, and only what is right is timed."""

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
    """Names of the cases that a device is measured with by default."""
    return ON_A_CPU if device.type == "cpu" else REAL


def usual_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Dtypes that a device is measured with by default."""
    return (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16, torch.float32)


def usual_rounds(device: torch.device) -> Rounds:
    """The number of rounds of a case; a CPU takes up to a second for one call."""
    if device.type == "cuda":
        return lambda case: 50 if case.tokens <= 5000 else 20
    return lambda case: 15 if case.tokens <= 1024 else 7


def measure(
    case: Case, sigmas: Sequence[float], providers: Sequence[Provider], device: torch.device, rounds: int
) -> Iterator[list[Row]]:
    """The rows of one case, a list per sigma, all providers of it timed in the same rounds."""
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
            pairs = zip(samples[name][clock], samples[fastest][clock], strict=False)  # slow ones end early
            row |= {"ratio": timing.spread(mine / its for mine, its in pairs), "ratio_to": fastest}
    return list(rows.values())


def _judged(provider: Provider, inputs: Inputs, sigma: float, wanted: checks.Expected) -> tuple[Row, Call | None]:
    """A row without times, and the call to time unless the row says why there is none."""
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
    except Exception as error:  # whatever a backend or a compiler raises is this row's answer
        row["reason"] = timing.first_line(error)
        return row, None
    row["error"] = errors or None
    if wrong:
        row["reason"] = wrong
        return row, None
    return row, call


def _too_large(provider: Provider, inputs: Inputs) -> str | None:
    """Whether a provider wants more than half of the memory that is free: a CPU's process would be killed."""
    needs, free = provider.scratch(inputs.case), machine.free_memory(inputs.device)
    if needs <= 0.5 * free:
        return None
    return f"it allocates {needs / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
