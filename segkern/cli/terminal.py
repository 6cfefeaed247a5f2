# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the commands: options, error messages, warnings and progress."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from segkern.generation import loading
from segkern.generation.drawing import ImageRequest, ImageResult, Specs, draw, label
from segkern.generation.vocabulary import unknown_words_warning

PROGRESS_SECONDS = 10.0  # between lines if standard error is not a terminal
SIGMAS = "1,2,5,10,inf"
NUMBERS = "numbers and inf"

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
GuidanceScale = Annotated[
    float | None,
    typer.Option(help="Scale of classifier-free guidance (CFG). 1 turns CFG off. Default: the pipeline's default."),
]
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


def need_diffusers(*packages: str, extra: str = "cli") -> None:
    """If packages are missing, print the command that installs them, and exit."""
    missing = loading.missing_packages(*packages)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        fail(f'{", ".join(missing)} {verb} not installed; pip install "segkern[{extra}]"')
    loading.quiet_libraries()


def warn(message: str) -> None:
    """Print a warning to standard error."""
    typer.echo(f"warning: {message}", err=True)


def warn_of_unknown_words(source: loading.Source, pipe: Any, *prompts: str) -> None:
    """Warn if the prompts contain words that the bundled model does not know."""
    message = unknown_words_warning(source, *prompts)
    if message is not None:
        warn(message)


def draw_with_progress(pipe: Any, request: ImageRequest, plan: Sequence[Specs], show: bool = True) -> list[ImageResult]:
    """Generate one image for each set of guidance specs, all from the same noise, and show the progress.

    On a terminal, the progress is a bar. Elsewhere, it is a line every 10 seconds.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    printed = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        for number, specs in enumerate(plan, 1):
            name = label(specs, request.guidance_scale)
            task = progress.add_task(name, total=request.steps)
            place = f"image {number} of {len(plan)}, " if len(plan) > 1 else ""

            def advance(
                pipe: Any, index: int, timestep: Any, tensors: Any, task: Any = task, line: str = f"{place}{name}"
            ) -> Any:
                nonlocal printed
                progress.update(task, total=pipe.num_timesteps, completed=index + 1)
                if show and not console.is_terminal and time.monotonic() - printed >= PROGRESS_SECONDS:
                    printed = time.monotonic()
                    typer.echo(f"{line}: step {index + 1} of {pipe.num_timesteps}", err=True)
                return tensors

            results.append(draw(pipe, request, specs, advance))
    return results
