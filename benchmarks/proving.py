# SPDX-License-Identifier: Apache-2.0
"""The command that runs the tests of a mark and keeps what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import compatibility as compatible
from benchmarks.refusals import refusing

Jobs = Annotated[str, typer.Option(help="Processes: a number or auto.")]


def compatibility(
    diffusers: Annotated[
        Path | None, typer.Option(help="Folder of pip install --no-deps --target with another diffusers.")
    ] = None,
    jobs: Jobs = "0",
    out: Annotated[
        Path | None, typer.Option(help="The JSON file; benchmarks/results/compatibility/<version>.json.")
    ] = None,
) -> None:
    """Run the tests that prove a cell of docs/models.md and write what became of them; a failure is exit code 1."""
    with refusing():
        path, found, code = compatible.run(diffusers, out, jobs)
    passed = sum(test["outcome"] == "passed" for test in found["tests"])
    typer.echo(f"diffusers {found['environment']['diffusers']}: {passed} of {len(found['tests'])} tests passed")
    typer.echo(f"wrote {path}")
    if code:
        raise typer.Exit(1)
