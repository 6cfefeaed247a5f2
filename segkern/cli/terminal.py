# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the commands: options, error messages, warnings and progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from segkern.generation import loading
from segkern.generation.drawing import ImageRequest, ImageResult, Specs, draw, label

SIGMAS = "1,2,5,10,inf"
NUMBERS = "numbers such as 4 or inf"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="'demo' (the bundled model), a checkpoint folder, a Hugging Face Hub name, or an SDXL .safetensors file.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(help="Configuration of a .safetensors file: a folder or Hub name. Default: SDXL base on the Hub."),
]
Width = Annotated[int | None, typer.Option(help="Width in pixels. Default: the model's.")]
Height = Annotated[int | None, typer.Option(help="Height in pixels. Default: the model's.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, metavar="<int>", help="Seed of the initial noise.")]
Steps = Annotated[int, typer.Option(min=1, metavar="<int>", help="Number of inference steps.")]
GuidanceScale = Annotated[float, typer.Option(help="Scale of classifier-free guidance (CFG). 1 turns CFG off.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ... auto selects the GPU if there is one.")]
DType = Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16. auto is fp16 on a GPU, else fp32.")]


def fail(message: object, program: str = "segkern") -> NoReturn:
    """Print one line to standard error and exit with code 2."""
    typer.echo(f"{program}: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


@contextmanager
def refusing(program: str = "segkern") -> Iterator[None]:
    """Report a ValueError or OSError as one line and exit. Use only around checks and loading."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error, program)


def need_diffusers(*others: str, extra: str = "cli") -> None:
    """Exit with the command that installs the missing packages, if any are missing."""
    missing = loading.missing_packages(*others)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        fail(f'{", ".join(missing)} {verb} not installed; pip install "segkern[{extra}]"')
    loading.quiet_libraries()


def draw_with_progress(pipe: Any, request: ImageRequest, plan: Sequence[Specs], show: bool = True) -> list[ImageResult]:
    """Draw one picture for each set of guidances, all from the same noise, with a bar if there is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        for specs in plan:
            task = progress.add_task(label(specs, request.guidance_scale), total=request.steps)

            def advance(pipe: Any, index: int, timestep: Any, tensors: Any, task: Any = task) -> Any:
                progress.update(task, total=pipe.num_timesteps, completed=index + 1)
                return tensors

            results.append(draw(pipe, request, specs, advance))
    return results
