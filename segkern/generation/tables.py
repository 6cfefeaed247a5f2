# SPDX-License-Identifier: Apache-2.0
"""Tables of the command line, and the formatting of numbers in them."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table


def new_table(*headings: str, title: str | None = None, gap: int = 2) -> Table:
    """Return an empty table without vertical lines, whose columns are ``gap`` spaces apart."""
    table = Table(
        *headings,
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
        show_header=any(headings),
    )
    for column in table.columns:
        column.overflow = "fold"  # the default would cut off long names
    return table


def show(table: Table) -> None:
    """Print a table within the width of the terminal, or within 80 columns if standard output is not a terminal."""
    Console(soft_wrap=False).print(table)


def percent(share: float | None) -> str:
    """Return a fraction as a percentage, or a dash for None.

    Example:
        >>> percent(0.123)
        '12.3%'
    """
    return "-" if share is None else f"{share:.1%}"
