# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the commands: options, error messages, warnings and progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

from segkern.generation import loading
from segkern.generation.drawing import ImageRequest, ImageResult, Specs, draw, label
from segkern.generation.vocabulary import unknown_words_warning

if TYPE_CHECKING:
    from segkern.integrations.diffusers import Report

PROGRESS_SECONDS = 10.0  # between lines if standard error is not a terminal
SIGMAS = "1,2,5,10,inf"
NUMBERS = "numbers and inf"
_CAUSES = 10  # in one warning, at most

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


class RayCommand(TyperCommand):
    """A command whose option ``--ray`` can have no value, which is then empty. typer has no such options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        for index, word in enumerate(words):
            if word == "--ray" and (index + 1 == len(words) or words[index + 1].startswith("-")):
                words[index] = "--ray="
        return super().parse_args(ctx, words)


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


def warn_of_unknown_words(source: loading.Source, *prompts: str) -> None:
    """Warn if the prompts contain words that the bundled model does not know."""
    message = unknown_words_warning(source, *prompts)
    if message is not None:
        warn(message)


class StepProgress:
    """The progress of inference steps: a bar on a terminal, and a line every 10 seconds elsewhere.

    An object is a context manager, and a function for diffusers' ``callback_on_step_end``.

    Args:
        show: Whether to show anything.
    """

    def __init__(self, show: bool = True) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = show and console.is_terminal
        self._lines = show and not console.is_terminal
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not self._bar, redirect_stdout=sys.stdout.isatty()
        )
        self._printed = time.monotonic()

    def begin(self, name: str, steps: int, place: str = "") -> None:
        """Begin to show the steps of an image. ``place`` precedes its name in lines."""
        self._task = self._progress.add_task(name, total=steps)
        self._line = place + name

    def __enter__(self) -> StepProgress:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        self._progress.update(self._task, total=pipe.num_timesteps, completed=index + 1)
        if self._lines and time.monotonic() - self._printed >= PROGRESS_SECONDS:
            self._printed = time.monotonic()
            typer.echo(f"{self._line}: step {index + 1} of {pipe.num_timesteps}", err=True)
        return tensors


class CountProgress:
    """The number of finished images: a bar on a terminal, and a line every 10 seconds elsewhere.

    Args:
        total: Number of images; None if it is unknown.
        lines: Whether to print lines elsewhere.
    """

    def __init__(self, total: int | None, lines: bool) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._lines = lines and not console.is_terminal
        self._of = "" if total is None else f" of {total}"
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("images", total=total)
        self._done = 0
        self._printed = time.monotonic()

    def __enter__(self) -> CountProgress:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def advance(self, images: int) -> None:
        """Count finished images."""
        self._done += images
        self._progress.advance(self._task, images)
        if self._lines and time.monotonic() - self._printed >= PROGRESS_SECONDS:
            self._printed = time.monotonic()
            typer.echo(f"generated {self._done}{self._of} images", err=True)


def draw_with_progress(pipe: Any, request: ImageRequest, plan: Sequence[Specs]) -> list[ImageResult]:
    """Generate one image for each set of guidance specs, all from the same noise, and show the progress."""
    results = []
    with StepProgress() as progress:
        for number, specs in enumerate(plan, 1):
            place = f"image {number} of {len(plan)}, " if len(plan) > 1 else ""
            progress.begin(label(specs, request.guidance_scale), request.steps, place)
            results.append(draw(pipe, request, specs, progress))
    return results


class Problems:
    """The problems in guidance reports, printed as one warning in place of one for each image and guidance method."""

    def __init__(self) -> None:
        self._causes: dict[str, dict[str, None]] = {}  # with the guidance methods

    def add(self, report: Report | None) -> None:
        """Add the problems of a report."""
        if report is None:
            return
        for problem in report.problems:
            spec = next((spec for spec in report.specs if problem.startswith(f"{spec} ")), None)
            method = "guidance:" if spec is None else type(spec).__name__
            cause = problem if spec is None else problem.removeprefix(f"{spec} ")
            if cause in self._causes or len(self._causes) < _CAUSES:
                self._causes.setdefault(cause, {})[method] = None

    def warn(self) -> None:
        """Print the warning if there are problems."""
        if self._causes:
            warn("; ".join(_problem(list(methods), cause) for cause, methods in self._causes.items()))


def _problem(methods: Sequence[str], cause: str) -> str:
    """Return a sentence such as ``SEG and PAG had no effect: they ...``."""
    if len(methods) == 1:
        return f"{methods[0]} {cause}"
    return f"{', '.join(methods[:-1])} and {methods[-1]} {cause.replace(': it ', ': they ')}"
