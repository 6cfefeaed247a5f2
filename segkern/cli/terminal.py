# SPDX-License-Identifier: Apache-2.0
"""What the commands share: refusals in one line, and the arguments that name a model and a size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from segkern.generation import loading

SIGMAS = "1,2,5,10,inf"
NUMBERS = "numbers such as 4 or inf"

Model = Annotated[
    str, typer.Argument(help="'demo', a checkpoint folder, a hub name, or a single .safetensors file (SDXL).")
]
Config = Annotated[
    str | None,
    typer.Option(help="Folder or hub name that describes a single file, so that it loads offline."),
]
Width = Annotated[int | None, typer.Option(help="Pixels; the model's own width if not given.")]
Height = Annotated[int | None, typer.Option(help="Pixels; the model's own height if not given.")]


def fail(message: object, program: str = "segkern") -> NoReturn:
    """End with exit code 2 and one line on standard error."""
    typer.echo(f"{program}: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


@contextmanager
def refusing(program: str = "segkern") -> Iterator[None]:
    """Turn what is wrong with a user's words and files into one line; only checks and loading stand in here."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error, program)


def need_diffusers(*others: str, extra: str = "cli") -> None:
    missing = loading.missing_packages(*others)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        fail(f'{", ".join(missing)} {verb} not installed; pip install "segkern[{extra}]"')
    loading.quiet_libraries()
