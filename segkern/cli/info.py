# SPDX-License-Identifier: Apache-2.0
"""``segkern info``: versions, devices, and the backend that computes an attention call."""

from __future__ import annotations

import math
import platform
from typing import TYPE_CHECKING, Annotated

import typer

from segkern.cli.terminal import fail, refusing
from segkern.generation import loading
from segkern.generation.tables import new_table, show
from segkern.version import __version__

if TYPE_CHECKING:
    from segkern.grid import Grid

_SHAPE, _HEADS, _HEAD_DIM = "64x64", 10, 64


def info(
    shape: Annotated[str | None, typer.Option(help=f"Token grid, height x width. Default: {_SHAPE}.")] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, metavar="<int>", help=f"Number of heads. Default: {_HEADS}.")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(min=1, metavar="<int>", help=f"Dimension of each head. Default: {_HEAD_DIM}.")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Sigma of the perturbed samples, in tokens, or inf. Default: inf.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, fp32, fp16 or bf16. auto is fp16 on a GPU, else fp32. Default: auto.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... Default: auto.")] = None,
    arch: Annotated[
        str | None, typer.Option(help="GPU architecture to assume, such as sm_90 or gfx942. Default: this machine's.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Print a bug-report template.")] = False,
) -> None:
    """Show versions, devices and attention backends.

    With --shape, --heads, --head-dim, --sigma, --dtype, --device or --arch, explain how one seg_attention call
    is computed.
    """
    call = {"--shape": shape, "--heads": heads, "--head-dim": head_dim, "--sigma": sigma}
    call |= {"--dtype": dtype, "--device": device, "--arch": arch}
    given = [option for option, value in call.items() if value is not None]
    if report:
        if given:
            fail(f"use either --report or {given[0]}, not both")
        from segkern.cli import diagnosis

        typer.echo(diagnosis.report())
    elif given:
        _explain(
            _SHAPE if shape is None else shape,
            heads or _HEADS,
            head_dim or _HEAD_DIM,
            math.inf if sigma is None else sigma,
            dtype or "auto",
            device or "auto",
            arch,
        )
    else:
        _show_machine()


def _explain(shape: str, heads: int, head_dim: int, sigma: float, dtype: str, device: str, arch: str | None) -> None:
    import torch

    from segkern.cli.explain import Call, explain

    with refusing():
        if not sigma >= 0:
            raise ValueError(f"--sigma must be 0, a positive number or inf, got {sigma:g}")
        torch_device = loading.find_device(device)
        fp16 = arch and dtype == "auto"
        torch_dtype = torch.float16 if fp16 else loading.find_dtype(dtype, torch_device)
        call = Call(_parse_grid(shape), heads, head_dim, sigma, torch_dtype)
        rows = explain(call, torch_device, arch)
    name = str(torch_dtype).removeprefix("torch.")
    title = f"{shape} tokens, {heads} heads of dimension {head_dim}, sigma {sigma:g}, {name}"
    table = new_table("", "", title=title)
    for topic, answer in rows:
        table.add_row(topic, answer)
    show(table)


def _show_machine() -> None:
    import torch

    from segkern.cli import diagnosis
    from segkern.core.environment import version_of

    versions = new_table("package", "version", title="Versions")
    versions.add_row("segkern", __version__)
    versions.add_row("python", platform.python_version())
    versions.add_row("torch", torch.__version__)  # names the CUDA build, which the package metadata omits
    for name in ("triton", "diffusers", "transformers"):
        versions.add_row(name, version_of(name))
    devices = diagnosis.devices()
    show(versions)
    typer.echo(f"\ncpu: {platform.machine()}, {torch.get_num_threads()} threads")
    for cuda in devices[1:]:
        typer.echo(f"{cuda}: {torch.cuda.get_device_name(cuda)}")
    for device in devices:
        for dtypes, backend, reason, calls in diagnosis.backends(device):
            typer.echo(f"\nseg_attention on {device}, {dtypes}: {backend} backend")
            typer.echo(f"Reason: {reason}")
            for call in calls:
                typer.echo(f"  {call}")
    if len(devices) == 1:
        typer.echo("\nNo CUDA device is available, so only the CPU is listed.")
    typer.echo("Run segkern info --report for a bug-report template.")


def _parse_grid(text: str) -> Grid:
    """Return the grid in ``64x48``, height and width in tokens.

    Raises:
        ValueError: If the text is not two positive integers.
    """
    from segkern.grid import Grid

    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
        raise ValueError(f"--shape must be a height and a width in tokens, such as 64x64, got {text!r}")
    return Grid(int(sides[0]), int(sides[1]))
