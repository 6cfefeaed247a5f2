# SPDX-License-Identifier: Apache-2.0
"""Run the commands of the benchmarks in this process, and make a small result file."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from benchmarks.__main__ import app


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def quick_run(folder: Path) -> Path:
    """Return the result file of a quick run of everything except FlexAttention, which is slow to compile."""
    path = folder / "quick.json"
    providers = "sdpa*,official,separable,dense,auto,torch,triton*,blur + sdpa*,stride *"
    ran = command("run", "--quick", "--device", "cpu", "--providers", providers, "--out", path)
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert f"wrote {path}" in ran.output
    return path
