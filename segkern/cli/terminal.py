# SPDX-License-Identifier: Apache-2.0
"""Parts that the commands share: refusals in one line, progress, and arguments that name a model and a size."""

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
    str, typer.Argument(help="'demo', a checkpoint folder, a hub name, or a single .safetensors file (SDXL).")
]
Config = Annotated[
    str | None,
    typer.Option(help="Folder or hub name that describes a single file, so that it loads offline."),
]
Width = Annotated[int | None, typer.Option(help="Pixels; the model's own width if not given.")]
Height = Annotated[int | None, typer.Option(help="Pixels; the model's own height if not given.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the initial noise.")]
Steps = Annotated[int, typer.Option(min=1, help="Of the scheduler.")]
GuidanceScale = Annotated[float, typer.Option(help="Of classifier-free guidance.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 and so on.")]
DType = Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16; auto is fp16 on CUDA.")]


def fail(message: object, program: str = "segkern") -> NoReturn:
    """End with exit code 2 and one line on standard error."""
    typer.echo(f"{program}: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


@contextmanager
def refusing(program: str = "segkern") -> Iterator[None]:
    """Turn errors in a user's words and files into one line; only checks and loading stand in here."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error, program)


def need_diffusers(*others: str, extra: str = "cli") -> None:
    """End with a line that says what to install, if packages are missing."""
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
