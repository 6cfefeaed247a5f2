# SPDX-License-Identifier: Apache-2.0
"""Runs of a pipeline from one seed, with and without guidance, and what to write down about them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from segkern.core.dispatch import choose_backend
from segkern.core.environment import version_of
from segkern.generation.loading import Source
from segkern.generation.tables import percent
from segkern.version import __version__

if TYPE_CHECKING:
    from segkern.integrations.diffusers import Report
    from segkern.integrations.diffusers.specs.base import Spec

Specs = tuple["Spec", ...]  # of one picture; none is no guidance

# Of a guidance, in a picture's settings; others where they are not the default.
_RECORDED_FIELDS = ("scale", "sigma", "layers", "layer", "start", "stop", "boundary", "query_stride", "reuse")


@dataclass(frozen=True)
class Job:
    """What to draw, whatever the guidance.

    Attributes:
        prompt: what the picture shows.
        negative_prompt: what it does not show.
        width: in pixels.
        height: in pixels.
        seed: of the initial noise.
        steps: of the scheduler.
        guidance_scale: of classifier-free guidance.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int
    steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Drawn:
    """A picture and how it came about.

    Attributes:
        image: the picture.
        report: what guidance did; None without guidance.
        seconds: of the whole run.
    """

    image: Image
    report: Report | None
    seconds: float


def check_layers(pipe: Any, specs: Specs, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what can be refused before weights are loaded.

    Raises:
        ValueError: for unknown layers, and for a backend that cannot serve them.
    """
    from segkern.integrations.diffusers.models.layers import list_layers, select_layers
    from segkern.integrations.diffusers.specs.base import AttentionSpec

    for spec in specs:
        if isinstance(spec, AttentionSpec):
            for layer in select_layers(list_layers(pipe), spec.layer_names):
                choose_backend(device, dtype, layer.head_dim, spec.backend or "auto")


def draw_all(pipe: Any, job: Job, plan: Sequence[Specs], show: bool = True) -> list[Drawn]:
    """One picture for each set of guidances, all from the same noise; on a terminal with progress to show."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    drawn = []
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        for specs in plan:
            task = progress.add_task(label(specs), total=job.steps)

            def step(pipe: Any, index: int, timestep: Any, tensors: Any, task: Any = task) -> Any:
                progress.update(task, total=pipe.num_timesteps, completed=index + 1)
                return tensors

            drawn.append(draw(pipe, job, specs, step))
    return drawn


def draw(pipe: Any, job: Job, specs: Specs, step: Callable[..., Any] | None = None, *, share: bool = True) -> Drawn:
    """One picture; ``step`` is diffusers' ``callback_on_step_end``, ``share`` is :func:`guide`'s.

    The noise comes from the CPU's generator, so that it is the same on every device. What ``step`` raises ends the run;
    guidance is off the pipeline then too.
    """
    from segkern.integrations.diffusers import guide

    def run() -> Image:
        image: Image = pipe(
            job.prompt,
            negative_prompt=job.negative_prompt or None,
            width=job.width,
            height=job.height,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed),
            callback_on_step_end=step,
        ).images[0]
        return image

    begun = time.perf_counter()
    if not specs:
        return Drawn(run(), None, time.perf_counter() - begun)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(SEG|PAG|SAG|CFG)\(", UserWarning)  # the report says the same
        with guide(pipe, *specs, share=share) as guidance:
            image = run()
        report = guidance.report()
    return Drawn(image, report, time.perf_counter() - begun)


def calls_of(pipe: Any, steps: int) -> int:
    """How often a run of so many steps calls the denoiser; some schedulers do so twice in a step.

    Raises:
        ValueError: for a number of steps that the scheduler does not take.
    """
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def report_table(plan: Sequence[Specs], drawn: Sequence[Drawn]) -> tuple[Table, list[str]]:
    """What guidance did in each run, as one table, and what went wrong."""
    columns, rows, problems = report_rows(plan, drawn)
    table = Table(*columns, title="guidance report")
    for row in rows:
        table.add_row(*row)
    return table, problems


def report_rows(plan: Sequence[Specs], drawn: Sequence[Drawn]) -> tuple[list[str], list[list[str]], list[str]]:
    """The same in words: headings, a row for each run, guidance and layer, and what went wrong."""
    reports = [(label(specs), one.report) for specs, one in zip(plan, drawn, strict=True) if one.report is not None]
    several = any(len(report.specs) > 1 for _, report in reports)
    columns = ["run", *["guidance"] * several, "layer", "fired", "moved", "module"]
    rows = []
    for name, report in reports:
        for row in report.layers:
            fired = f"{row.fired} of {report.forwards}"
            of = [type(report.specs[row.spec]).__name__] if several else []
            rows.append([name, *of, row.layer, fired, percent(row.moved), row.module])
    return columns, rows, [problem for _, report in reports for problem in report.problems]


def label(specs: Specs) -> str:
    """What a run is called in tables and pictures."""
    return " + ".join(map(_label, specs)) or "without guidance"


def _label(spec: Spec) -> str:
    sigma = getattr(spec, "sigma", None)
    if type(spec).__name__ == "SEG" and isinstance(sigma, float):
        return "sigma infinity" if sigma == float("inf") else f"sigma {sigma:g}"
    return f"{type(spec).__name__} {spec.scale:g}"


def describe(source: Source, job: Job, specs: Specs, dtype: torch.dtype) -> dict[str, object]:
    """All that is needed to draw a picture again, by name."""
    details: dict[str, object] = {
        "model": source.name,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "steps": job.steps,
        "width": job.width,
        "height": job.height,
        "guidance_scale": job.guidance_scale,
        "dtype": str(dtype).removeprefix("torch."),
        "guidance": " + ".join(type(spec).__name__ for spec in specs) or "none",
    }
    for spec in specs:
        name = type(spec).__name__.lower()
        for each, value in spec.main_values(_RECORDED_FIELDS).items():
            details[f"{name}_{each}"] = f"{value:g}" if each == "sigma" else _listed(value)
    return details | {"segkern": __version__, **{name: version_of(name) for name in ("torch", "diffusers")}}


def _listed(value: object) -> object:
    """A value, or several with commas, as an option takes them."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value
