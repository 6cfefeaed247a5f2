# SPDX-License-Identifier: Apache-2.0
"""Collects the ratios of a run, prints them at its end and, with ``--save-results``, keeps them as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from segkern.environment import environment as measured_with

RESULTS = Path(__file__).parent / "results"
ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that keeps a run's ratios."""
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/<device>.json")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line per case: medians, and ratios to plain attention and to the official algorithm."""
    if not ROWS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("medians of interleaved rounds, a third of the batch blurred")
    header = f"{'case':30} {'sigma':>6} {'sdpa ms':>9} {'official':>9} {'segkern':>9} {'x sdpa':>8} {'x official':>11}"
    write(header)
    for row in ROWS:
        write(
            f"{row['case']:30} {row['sigma']:>6} {row['sdpa_ms']:9.1f} {row['official_ms']:9.1f} "
            f"{row['segkern_ms']:9.1f} {row['ratio_to_sdpa']:8.3f} {row['ratio_to_official']:11.3f}"
        )
    if config.getoption("--save-results"):
        environment = measured_with(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        device = environment["device"].lower()
        name = "".join(c if c.isalnum() else "-" for c in device).strip("-")
        while "--" in name:
            name = name.replace("--", "-")
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps({"environment": environment, "attention": ROWS}, indent=1) + "\n")
        write(f"written: {path}")
