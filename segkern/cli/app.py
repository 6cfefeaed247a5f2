# SPDX-License-Identifier: Apache-2.0
"""The ``typer`` application of the console script ``segkern``, with all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from segkern.cli.demo import demo
from segkern.cli.energy import energy
from segkern.cli.generate import generate
from segkern.cli.info import info
from segkern.cli.layers import layers
from segkern.cli.terminal import RayCommand
from segkern.cli.ui import ui
from segkern.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"segkern {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Smoothed Energy Guidance (SEG) for diffusion models."""


app.command(cls=RayCommand)(generate)
for command in (layers, energy, info, demo, ui):
    app.command()(command)
