# SPDX-License-Identifier: Apache-2.0
"""Tables that are printed at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.results import Result, Row


def milliseconds(spread: dict[str, float] | str | None) -> str:
    """Return the median as text, or a dash.

    Example:
        >>> milliseconds({"median": 0.04123}), milliseconds({"median": 94.23}), milliseconds("not measured")
        ('0.0412', '94.2', '-')
    """
    return f"{spread['median']:.3g}" if isinstance(spread, dict) else "-"


def of_rows(result: Result) -> Table:
    """Return a table with one line per row, and the clocks that the device has."""
    clocks = ["wall", "hot", "cold", "graph"] if result["environment"]["device_type"] == "cuda" else ["wall"]
    headings = [*(f"{clock} ms" for clock in clocks), "p20-p80", "TFLOP/s", "x plain", "peak MiB", "error"]
    table = Table("case", "dtype", "sigma", "provider", *headings)
    for row in result["rows"]:
        start = (row["case"], row["dtype"], row["sigma"], row["provider"])
        if row["reason"] is not None:
            table.add_row(*start, *("-" for _ in headings), style="dim")
            continue
        main = row[f"{result['headline']}_ms"]
        ends = f"{main['p20']:.3g}-{main['p80']:.3g}"
        ratio = f"{row['ratio']['median']:.3f}" if row["ratio"] else "-"
        memory = f"{row['peak_mib']:.0f}" if isinstance(row["peak_mib"], float) else "-"
        rate = f"{row['tflops']:.3g}" if row["tflops"] is not None else "-"
        error = f"{row['error']['relative']:.1e}" + ("" if row["exact"] else " approximate")
        table.add_row(*start, *(milliseconds(row[f"{c}_ms"]) for c in clocks), ends, rate, ratio, memory, error)
    return table


def without_time(rows: Sequence[Row]) -> list[str]:
    """Return a line per provider and reason for rows that were not timed."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["reason"] is not None:
            which = (row["provider"], row["reason"])
            counts[which] = counts.get(which, 0) + 1
    return [f"not timed, {count} rows: {provider}: {reason}" for (provider, reason), count in counts.items()]


def of_lines(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Return lines of text as a table."""
    table = Table(*headings)
    for line in lines:
        table.add_row(*line)
    return table


def of_tiles(tuned: dict[str, Any]) -> Table:
    """Return a table of all tiles that were tried for one shape, fastest first."""
    title = f"{tuned['case']}, {tuned['dtype']}, sigma {tuned['sigma']}, {tuned['environment']['device']}"
    table = Table(
        "queries", "keys", "columns", "warps", "stages", "registers", "descriptors", "ms", "p20-p80", "", title=title
    )
    for row in tuned["tiles"]:
        shape = ["-" if value in (None, False) else str(value) for value in row["tile"].values()]
        ends = f"{row['ms']['p20']:.3g}-{row['ms']['p80']:.3g}" if row["ms"] else "-"
        note = row["reason"] or ("current" if row["tile"] == tuned["now"] else "")
        table.add_row(*shape, milliseconds(row["ms"]), ends, note, style="dim" if row["reason"] else None)
    return table


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + f" {align} |" * (len(headings) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
