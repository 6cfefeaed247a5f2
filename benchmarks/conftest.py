# SPDX-License-Identifier: Apache-2.0
"""Collects the ratios of a run of ``pytest benchmarks`` and prints them at its end."""

from __future__ import annotations

from typing import Any

import pytest

ROWS: list[dict[str, Any]] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line per case: medians, and ratios to plain attention and to the official algorithm."""
    if not ROWS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("medians of interleaved rounds, a third of the batch blurred")
    write(f"{'case':14} {'sigma':>6} {'sdpa ms':>9} {'official':>9} {'auto':>9} {'x sdpa':>8} {'x official':>11}")
    for row in ROWS:
        sdpa, official, auto = (row[name] for name in ("sdpa", "official", "auto"))
        write(
            f"{row['case']:14} {row['sigma']:>6} {sdpa:9.3g} {official:9.3g} {auto:9.3g} "
            f"{auto / sdpa:8.3f} {auto / official:11.3f}"
        )
