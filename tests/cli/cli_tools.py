# SPDX-License-Identifier: Apache-2.0
"""Commands run in this process, and the pictures that they write."""

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
    """Output of a command that must succeed."""
    result = segkern(*arguments, program=program)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def picture(path: Path) -> Any:
    """A picture from disk, its file closed; of a PNG its ``text`` too."""
    with Image.open(path) as image:
        image.load()
    return image


def refusal(*arguments: object, program: Typer = app) -> str:
    """The one line with which a command refuses."""
    result = segkern(*arguments, program=program)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("segkern: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
