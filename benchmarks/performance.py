# SPDX-License-Identifier: Apache-2.0
"""The page ``docs/performance.md``: what was measured where, a table per suite, what limits each way to compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import host, plots
from benchmarks.checks import share_of_allowed
from benchmarks.measure import summary
from benchmarks.providers import PROVIDERS
from benchmarks.results import Result, Row
from benchmarks.suites import SUITES
from benchmarks.tables import markdown, milliseconds
from benchmarks.work import PEAKS, Work, limits

_INTRODUCTION = """\
# What it costs

`python -m benchmarks.readme` writes this page from the files in `benchmarks/results/`; no number here is typed by hand.
`python -m benchmarks run --suite NAME` measures a suite, `plot` draws it, `compare` holds two files against each other.

A batch is [unconditional, conditional, perturbed]: only its last third is blurred, and plain attention of the same
batch without any blur is what a user compares with. All ways to compute see the same random inputs and take turns in
every round. Before a result is timed it is held against the float64 reference under the numerics contract, on one plain
and one blurred sample, four heads and some 256 rows of them; a wrong one has no time. Approximations (`stride`) are not
held to the contract: their error is shown instead. A ratio is the median over rounds of a time divided by that of the
fastest unblurred attention in the same round. On a GPU times are the device's, with L2 as the same call left it (hot)
or overwritten (cold), or of a call in a CUDA graph; on a CPU they are the clock on the wall. TFLOP/s count the FLOPs of
unblurred attention, so that they rank as times do."""

_NO_GPU = """\
**GPU: not measured.** No result file comes from a GPU: how fast the Triton kernels are on a real device is not known,
and nothing on this page says so."""

_LIMITS = """\
Work is counted from the algorithm: a multiply-add is two FLOPs, every tensor moves once between memory and chip, what a
fused kernel keeps on the chip does not move. The limit is the longest of the times that a device's peak rates give for
products, exponentials and bytes; `of limit` is that time over the measured one. Attention does 4 N² D FLOPs and N²
exponentials a head for 8 N D bytes in half precision, so N / 2 FLOPs a byte: products and exponentials limit it, memory
does not. At infinite sigma the blurred third has one row: its share of the products goes, what is left of it is reading
keys and values and writing outputs."""


_HOST = """\
Tensors of 16 tokens, so that nothing but the host takes time, in turn with PyTorch's attention of the same batch. On a
CPU, `auto` runs PyTorch operators, whose own time is in it: the blur's products, a second attention, a copy that joins
the two. `triton, without launches` is segkern's share of a call on a GPU: checks, the choice of kernels, tables,
outputs and arguments, each kernel replaced by nothing. What Triton takes to launch one comes on top."""


def page(
    files: Mapping[str, Result],
    hosts: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """The whole page from result files by their stems; those of quick runs are left out.

    Args:
        files: of the suites.
        hosts: what a call costs the host (:mod:`benchmarks.host`).
    """
    files = {stem: result for stem, result in files.items() if not result["quick"]}
    parts = [_INTRODUCTION, "## What was measured where", _where(files)]
    if not any(result["environment"]["device_type"] == "cuda" for result in files.values()):
        parts.append(_NO_GPU)
    for name, suite in SUITES.items():
        parts += [f"## {name.capitalize()}", suite.asks]
        here = {stem: result for stem, result in files.items() if result["suite"] == name}
        parts += [text for stem, result in here.items() for text in _file(stem, result)] or ["Not measured."]
    parts += ["## Host", _HOST, *(_host(stem, found) for stem, found in (hosts or {}).items())]
    parts += ["## What limits each way to compute", _LIMITS]
    parts += [
        text for stem, result in files.items() if result["suite"] == "attention" for text in _limits(stem, result)
    ]
    parts += ["## The ways to compute", _ways()]
    return "\n\n".join(parts) + "\n"


def _where(files: Mapping[str, Result]) -> str:
    rows = []
    for stem, result in files.items():
        env, found = result["environment"], result["rows"]
        dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in found))
        device = env["device"] + (f", {env['threads']} threads" if env["device_type"] == "cpu" else "")
        timed = f"{summary(found)['timed']} of {len(found)}" + ("" if result["complete"] else ", cut off")
        versions = f"{env['torch']} | {env.get('triton', 'not recorded')} | `{env['commit']}`"
        rows.append([f"`{stem}.json`", device, result["suite"], dtypes, timed, versions])
    headings = ("file", "device", "suite", "dtypes", "rows with a time", "torch", "triton", "commit")
    return markdown(headings, rows, "---") if rows else "Nothing yet."


def _file(stem: str, result: Result) -> list[str]:
    """One result file: a table per dtype, reasons, the largest error, pictures."""
    parts = [f"### `{stem}`: {result['environment']['device']}"]
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        parts += [f"Time relative to the fastest unblurred attention, {dtype}:", _ratios(result, rows)]
        parts += _details(result, rows)
    parts += _reasons(result["rows"])
    parts += _errors(result["rows"])
    drawn, left_out = plots.pictures(stem, result)
    parts += [f"![{picture.title}](../benchmarks/results/{picture.name})" for picture in drawn]
    parts += [f"{reason[0].upper()}{reason[1:]}." for reason in left_out]
    return parts


def _ratios(result: Result, rows: Sequence[Row]) -> str:
    """A line per case and sigma, a column per provider that blurs."""
    providers = list(dict.fromkeys(row["provider"] for row in rows if row["kind"] != "plain"))
    by_name = {(row["case"], row["sigma"], row["provider"]): row for row in rows}
    lines, clock = [], f"{result['headline']}_ms"
    for case, sigma in dict.fromkeys(name[:2] for name in by_name):
        here = [row for row in rows if (row["case"], row["sigma"]) == (case, sigma)]
        fastest = next((row["ratio_to"] for row in here if row["ratio_to"]), None)
        plain = by_name.get((case, sigma, fastest))
        base = f"{milliseconds(plain[clock])} ms ({fastest})" if plain else "none"
        cells = [_ratio(by_name.get((case, sigma, provider))) for provider in providers]
        lines.append([case, str(here[0]["batch"]), "∞" if sigma == "inf" else sigma, base, *cells])
    return markdown(["layer", "batch", "sigma", "unblurred", *providers], lines)


def _ratio(row: Row | None) -> str:
    if row is None or row["ratio"] is None:
        return "-"
    text = f"{row['ratio']['median']:.3g}" if row["ratio"]["median"] < 0.1 else f"{row['ratio']['median']:.2f}"
    return text if row["exact"] else f"{text} (error {row['error']['relative']:.0e})"


def _example(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The case and sigmas that stand for the rest: SDXL's large layer or the largest, sigma 10 or near it, infinity."""
    cases = {row["case"]: row["tokens"] for row in rows}
    if not cases:
        return []
    case = "sdxl-64x64" if "sdxl-64x64" in cases else max(cases, key=lambda name: cases[name])
    sigmas = {row["sigma"] for row in rows if row["case"] == case}
    finite = sorted(sigmas - {"inf"}, key=lambda sigma: abs(float(sigma) - 10.0))[:1]
    return [(case, sigma) for sigma in (*finite, *(sigmas & {"inf"}))]


def _details(result: Result, rows: Sequence[Row]) -> list[str]:
    """Every clock, rates, memory and error of the example."""
    parts = []
    for case, sigma in _example(rows):
        lines = []
        for row in rows:
            if (row["case"], row["sigma"]) != (case, sigma) or row["reason"] is not None:
                continue
            clocks = [milliseconds(row[f"{clock}_ms"]) for clock in ("hot", "cold", "graph", "wall")]
            main = row[f"{result['headline']}_ms"]
            rate = "-" if row["tflops"] is None else f"{row['tflops']:.3g}"
            memory = f"{row['peak_mib']:.0f}" if isinstance(row["peak_mib"], float) else "not measured"
            ends = f"{main['p20']:.3g} to {main['p80']:.3g}"
            lines.append([row["provider"], *clocks, ends, rate, memory, f"{row['error']['relative']:.1e}"])
        headings = [
            "",
            "hot ms",
            "cold ms",
            "graph ms",
            "wall ms",
            "p20 to p80",
            "TFLOP/s",
            "peak MiB",
            "relative error",
        ]
        if lines:
            parts += [f"`{case}` at sigma {'∞' if sigma == 'inf' else sigma} in full:", markdown(headings, lines)]
    return parts


def _reasons(rows: Sequence[Row]) -> list[str]:
    found = summary(rows)["reasons"]
    if not found:
        return []
    lines = [f"- {', '.join(sorted(providers))}: {reason}" for reason, providers in sorted(found.items())]
    return ["Without a time:", "\n".join(lines)]


def _errors(rows: Sequence[Row]) -> list[str]:
    """How near the exact results come to what the contract allows."""
    timed = [row for row in rows if row["exact"] and row["error"] and not row["reason"]]
    shares = [(share_of_allowed(row["error"], getattr(torch, row["dtype"])), row) for row in timed]
    if not shares:
        return []
    share, row = max(shares, key=lambda pair: pair[0])
    where = f"{row['provider']}, `{row['case']}`, {row['dtype']}, sigma {row['sigma']}"
    text = "The largest root-mean-square error of a blurred sample that is exact and timed"
    return [f"{text} is {share:.0%} of what the contract allows ({where})."]


def _host(stem: str, found: dict[str, Any]) -> str:
    environment = found["environment"]
    where = (
        f"{environment['device']}, torch {environment['torch']}, commit `{environment['commit']}` (`host/{stem}.json`):"
    )
    return f"{where}\n\n{markdown(host.HEADINGS, host.lines(found['rows']))}"


def _limits(stem: str, result: Result) -> list[str]:
    """Counted work of the example, what limits it there, and how near the measurement comes."""
    parts = []
    peaks = PEAKS.get(result["environment"]["device"])
    device = result["environment"]["device"]
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        for case, sigma in _example(rows):
            lines = []
            for row in rows:
                if (row["case"], row["sigma"]) != (case, sigma):
                    continue
                ms = None if row["reason"] else row[f"{result['headline']}_ms"]["median"]
                counted = [f"{row[name] / 1e9:.3g}" for name in ("flops", "exps", "bytes")]
                achieved = "-" if ms is None else f"{row['flops'] / ms / 1e9:.3g}"
                line = [row["provider"], *counted, f"{row['flops'] / row['bytes']:.0f}", achieved]
                if peaks is not None:
                    times = limits(Work(row["flops"], row["exps"], row["bytes"]), peaks, dtype)
                    unit = max(times, key=lambda name: times[name])
                    share = "-" if ms is None else f"{times[unit] / ms:.0%}"
                    line += [unit, f"{times[unit]:.3g}", "-" if ms is None else f"{ms:.3g}", share]
                lines.append(line)
            headings = ["", "GFLOP", "G exponentials", "GB", "FLOP/byte", "TFLOP/s reached"]
            headings += ["limit", "limit ms", "measured ms", "of limit"] if peaks is not None else []
            at = "∞" if sigma == "inf" else sigma
            parts += [f"`{case}`, {dtype}, sigma {at} on {device} (`{stem}`):", markdown(headings, lines)]
    if peaks is None:
        parts.append(
            f"The peak rates of {device} are not known to `benchmarks/work.py`, so its distance to a limit is not."
        )
    else:
        parts.append(f"Peak rates: {peaks.source}.")
    return parts


def _ways() -> str:
    return markdown(
        ["name", "what"],
        [[f"`{provider.name}`", provider.what] for provider in PROVIDERS.values()],
        "---",
    )
