# SPDX-License-Identifier: Apache-2.0
"""Functions that run commands in this process and read the images they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from typer import Typer
from typer.testing import CliRunner, Result

from segkern.cli.app import app


def segkern(*arguments: object, program: Typer = app) -> Result:
    return CliRunner().invoke(program, [str(argument) for argument in arguments])


def done(*arguments: object, program: Typer = app) -> str:
    """Run a command that must succeed, and return its output."""
    result = segkern(*arguments, program=program)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def picture(path: Path) -> Any:
    """Read an image and close its file. A PNG image also has ``text``."""
    with Image.open(path) as image:
        image.load()
    return image


def refusal(*arguments: object, program: Typer = app) -> str:
    """Run a command that must fail, and return its one-line error."""
    result = segkern(*arguments, program=program)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("segkern: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
