# SPDX-License-Identifier: Apache-2.0
"""How the commands refuse what is wrong with a user's words and files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


def fail(message: object) -> NoReturn:
    """End with exit code 2 and one line on standard error."""
    typer.echo(f"benchmarks: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what is wrong with a user's words and files into one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)
