# SPDX-License-Identifier: Apache-2.0
"""Comparison of two runs of a suite, row by row: which rows became slower or faster by more than their noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.results import Result, Row, key

SLOWER, FASTER, SAME, LOST, GAINED = "slower", "faster", "same", "lost", "gained"
_COLOURS = {SLOWER: "red", LOST: "red", FASTER: "green", GAINED: "green"}


@dataclass(frozen=True)
class Line:
    """One row of both runs: its key, medians (None if not timed), a verdict, and why it is no longer timed."""

    key: tuple[str, ...]
    before: float | None
    after: float | None
    verdict: str
    reason: str = ""


def compare(first: Result, second: Result, by: str = "time", tolerance: float = 0.03) -> list[Line]:
    """Compare every row that both runs have.

    A change counts if the ranges from the 20th to the 80th percentile do not overlap and the medians differ by more
    than ``tolerance``, relative to the first. A row that is no longer timed is a regression. ``by`` is ``"time"``, or
    ``"ratio"`` to unblurred attention in the same run, which is comparable across devices.

    Raises:
        ValueError: If the two runs are not comparable. The message quotes the difference.
    """
    if by not in ("time", "ratio"):
        raise ValueError(f"--by must be time or ratio, got {by!r}")
    if first["suite"] != second["suite"]:
        raise ValueError(f"the suites differ: {first['suite']!r} and {second['suite']!r}")
    devices = [result["environment"]["device"] for result in (first, second)]
    if by == "time" and devices[0] != devices[1]:
        raise ValueError(f"cannot compare times of different devices {devices[0]!r} and {devices[1]!r}; use --by ratio")
    before, after = ({key(row): row for row in result["rows"]} for result in (first, second))
    common = [name for name in before if name in after]
    if not common:
        raise ValueError("the two files have no rows in common")
    fields = [f"{result['headline']}_ms" if by == "time" else "ratio" for result in (first, second)]
    return [_line(name, before[name], after[name], fields, tolerance) for name in common]


def _line(name: tuple[str, ...], old: Row, new: Row, fields: Sequence[str], tolerance: float) -> Line:
    a, b = old[fields[0]], new[fields[1]]
    if a is None or b is None:
        verdict = SAME if a is b else LOST if b is None else GAINED
        before, after = (None if spread is None else spread["median"] for spread in (a, b))
        return Line(name, before, after, verdict, (new["reason"] or "") if verdict == LOST else "")
    verdict = SAME
    if b["p20"] > a["p80"] and b["median"] > (1 + tolerance) * a["median"]:
        verdict = SLOWER
    elif b["p80"] < a["p20"] and b["median"] < (1 - tolerance) * a["median"]:
        verdict = FASTER
    return Line(name, a["median"], b["median"], verdict)


def regressed(lines: Sequence[Line]) -> bool:
    """Return whether any row became worse."""
    return any(line.verdict in (SLOWER, LOST) for line in lines)


def table(lines: Sequence[Line], by: str) -> Table:
    """Return the rows as a table, with regressions in red."""
    unit = "ms" if by == "time" else "x unblurred"
    headings = (f"before, {unit}", f"after, {unit}", "after / before", "verdict")
    shown = Table("case", "dtype", "sigma", "provider", *headings)
    for line in lines:
        change = f"{line.after / line.before:.3f}" if line.before and line.after else "-"
        numbers = ["-" if x is None else f"{x:.4g}" for x in (line.before, line.after)]
        verdict = f"{line.verdict}: {line.reason}" if line.reason else line.verdict
        shown.add_row(*line.key, *numbers, change, verdict, style=_COLOURS.get(line.verdict))
    return shown


def counted(lines: Sequence[Line]) -> str:
    """Return how many rows have each verdict, such as ``2 same, 1 slower``."""
    return ", ".join(f"{count} {verdict}" for verdict, count in Counter(line.verdict for line in lines).most_common())
