# SPDX-License-Identifier: Apache-2.0
"""``segkern info``: versions, devices, and which backend serves which attention, and why."""

from __future__ import annotations

import math
import platform
from typing import Annotated

import torch
import typer
from rich.table import Table

from segkern.cli import diagnosis
from segkern.cli.explain import Call, explain
from segkern.cli.terminal import refusing
from segkern.core.environment import version_of
from segkern.generation import loading
from segkern.generation.tables import wide
from segkern.grid import Grid
from segkern.version import __version__


def info(
    shape: Annotated[str | None, typer.Option(help="Explain one attention instead: its grid, such as 64x64.")] = None,
    heads: Annotated[int, typer.Option(help="With --shape.")] = 10,
    head_dim: Annotated[int, typer.Option(help="With --shape.")] = 64,
    sigma: Annotated[float, typer.Option(help="With --shape: of the perturbed samples, or inf.")] = math.inf,
    dtype: Annotated[str, typer.Option(help="With --shape: auto, fp32, fp16 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="With --shape: auto, cpu, cuda, cuda:1 and so on.")] = "auto",
    arch: Annotated[str | None, typer.Option(help="With --shape: as if on sm_90, gfx942 and so on.")] = None,
    report: Annotated[bool, typer.Option("--report", help="All that a report of a fault needs, to be copied.")] = False,
) -> None:
    """Versions, devices, and which backend serves the attention of common models; or, with --shape, one of them."""
    if report:
        typer.echo(diagnosis.report())
        return
    if shape is not None:
        with refusing():
            torch_device = loading.find_device(device)
            fp16 = arch and dtype == "auto"
            torch_dtype = torch.float16 if fp16 else loading.find_dtype(dtype, torch_device)
            call = Call(_parse_grid(shape), heads, head_dim, sigma, torch_dtype)
            rows = explain(call, torch_device, arch)
        table = Table("", "", title=f"{shape} tokens, {heads} heads of {head_dim}, sigma {sigma:g}", show_header=False)
        for topic, answer in rows:
            table.add_row(topic, answer)
        wide(table).print(table)
        return
    versions = Table("package", "version", title="versions")
    versions.add_row("segkern", __version__)
    versions.add_row("python", platform.python_version())
    versions.add_row("torch", torch.__version__)  # with its build, which the package index's metadata leave out
    for name in ("triton", "diffusers", "transformers"):
        versions.add_row(name, version_of(name))
    devices = diagnosis.devices()
    served = Table("device", "call", "head dim", "dtype", "backend", "why", title="who serves seg_attention")
    for served_device in devices:
        for layer, width, dtypes, backend, reason in diagnosis.served(served_device):
            served.add_row(str(served_device), layer, str(width), dtypes, backend, reason)
    console = wide(versions, served)
    console.print(versions)
    typer.echo(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads")
    for cuda in devices[1:]:
        typer.echo(f"{cuda}: {torch.cuda.get_device_name(cuda)}")
    console.print(served)
    if len(devices) == 1:
        typer.echo("There is no CUDA device here, so what one would use is not shown.")
    typer.echo("segkern info --report prints all that a report of a fault needs, to be copied.")


def _parse_grid(text: str) -> Grid:
    """The grid in ``64x48``: height and width in tokens.

    Raises:
        ValueError: for anything else.
    """
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
        raise ValueError(f"--shape takes a height and a width in tokens such as 64x64, got {text!r}")
    return Grid(int(sides[0]), int(sides[1]))
