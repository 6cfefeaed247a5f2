# SPDX-License-Identifier: Apache-2.0
"""Printing of tables and of numbers in them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def wide(*tables: Table) -> Console:
    """A console as wide as the terminal or, where output is no terminal, as the widest table."""
    console = Console()
    for table in tables:
        table.columns[-1].overflow = "fold"  # names of modules break rather than lose their ends
    if not console.is_terminal:
        wanted = Console(width=10_000)
        console = Console(width=max(wanted.measure(table).maximum for table in tables))
    return console


def percent(share: float | None) -> str:
    """A share of 1 in percent, a dash for None.

    Example:
        >>> percent(0.123)
        '12.3%'
    """
    return "-" if share is None else f"{share:.1%}"
