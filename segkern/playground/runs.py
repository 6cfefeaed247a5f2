# SPDX-License-Identifier: Apache-2.0
"""One click of Generate: images before and after guidance, their difference, times, report and Python code."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from segkern.analysis import plots, report
from segkern.generation.calls import call_arguments
from segkern.generation.drawing import ImageResult, denoiser_calls, draw, image_metadata, label, report_rows
from segkern.generation.loading import Source
from segkern.generation.pictures import difference, difference_image, save
from segkern.generation.vocabulary import unknown_words_warning
from segkern.playground.choices import CONTRAST
from segkern.playground.form import Settings
from segkern.playground.models import Models
from segkern.playground.snippet import snippet

_BOUNDARY = "reflect"  # of the recorded energies, which are shown without a blur


@dataclass(frozen=True)
class Progress:
    """A step of one of the pipeline runs that a click of Generate starts.

    Attributes:
        name: Caption of the run.
        run: Number of the run, from 1.
        runs: Number of runs.
        step: Number of completed steps of this run.
        steps: Number of steps of every run, as set by the user.
    """

    name: str
    run: int
    runs: int
    step: int
    steps: int


OnStep = Callable[[Progress], None]


class Stopped(Exception):
    """A run ended because the user clicked Stop."""


class Run:
    """The settings of one click of Generate.

    Attributes:
        source: Model.
        settings: What to generate.
        owner: Session of the page.
        fields: Values of all fields of the page, to be restored later.
        begun: Whether the run has started.
    """

    def __init__(self, source: Source, settings: Settings, owner: str = "", fields: tuple[Any, ...] = ()) -> None:
        self.source = source
        self.settings = settings
        self.owner = owner
        self.fields = fields
        self.begun = False
        self._stop = threading.Event()

    def stop(self) -> None:
        """Stop the run after the current step, or before it starts."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """True if the run was stopped."""
        return self._stop.is_set()

    def check(self) -> None:
        """Check whether the run may continue.

        Raises:
            Stopped: If the run was stopped.
        """
        if self.stopping:
            raise Stopped


@dataclass(frozen=True)
class RunResult:
    """Everything that the page shows of a run.

    Attributes:
        before: PNG file of the image without the guidance methods; it contains the settings as text.
        after: PNG file of the image with the guidance methods.
        difference: PNG file of the absolute difference, with higher contrast.
        mean_difference: Mean absolute difference, in levels of 0 to 255.
        size: Width and height of the images.
        captions: Captions of the images before and after.
        timing: Caption, seconds, and seconds relative to the first image, for every image.
        headings: Headings of the report.
        report: One row per guidance method and layer.
        problems: Warnings about the guidance and the prompt, in sentences.
        maps: PNG file of the attention energy; None if it was not requested.
        snippet: Python code that generates the guided image again.
        seconds: Duration of all runs.
    """

    before: Path
    after: Path
    difference: Path
    mean_difference: float
    size: tuple[int, int]
    captions: tuple[str, str]
    timing: list[list[str]]
    headings: list[str]
    report: list[list[str]]
    problems: tuple[str, ...]
    maps: Path | None
    snippet: str
    seconds: float


def generate(run: Run, models: Models, folder: Path, on_step: OnStep) -> RunResult:
    """Generate all images and the energy map of a run, one after the other.

    Args:
        run: Settings; another thread may stop the run.
        models: Models; they run one at a time.
        folder: Folder in which to create a new folder for the files.
        on_step: Function that is called after every step.

    Raises:
        ValueError: If the pipeline does not support the guidance.
        Stopped: If the run was stopped; the pipeline is left as it was before.
    """
    from segkern.integrations.diffusers import guide, record_energy

    with models.lock:
        run.check()
        run.begun = True
        begun = time.perf_counter()
        settings, pipe = run.settings, models.load(run.source)
        request, specs = settings.request, settings.specs
        guide(pipe, *specs).remove()  # raises for pipelines that cannot be guided
        scale = request.guidance_scale
        captions = label((), scale), label(specs, scale)
        steps = _Steps(run, on_step, runs=2 + settings.unshared + bool(settings.layers))
        before = draw(pipe, request, (), steps.count(captions[0]))
        after = draw(pipe, request, specs, steps.count(captions[1]))
        results = [(captions[0], before), (captions[1], after)]
        if settings.unshared:
            name = f"{captions[1]}, branch in full"
            results.append((name, draw(pipe, request, specs, steps.count(name), share=False)))
        recorder = None
        if settings.layers:  # a separate run, so that the timed runs take their usual time
            calls = denoiser_calls(pipe, request.steps)
            with record_energy(pipe, settings.layers, (), {0, calls // 2, calls - 1}, boundary=_BOUNDARY) as recorder:
                draw(pipe, request, (), steps.count("attention energy"))

    source = run.source
    files = Path(tempfile.mkdtemp(dir=folder))
    names = ("before", "after", "difference")
    before_file, after_file, difference_file = (files / f"segkern-{name}-seed-{request.seed}.png" for name in names)
    metadata = image_metadata(source, request, (), models.dtype, pipe.scheduler)
    save(before.image, before_file, metadata)
    save(after.image, after_file, image_metadata(source, request, specs, models.dtype, pipe.scheduler))
    save(difference_image(before.image, after.image, CONTRAST), difference_file, {})
    maps = None
    if recorder is not None:
        summary = report.summary(recorder, metadata, _BOUNDARY)
        maps = _stack(plots.plot_maps(summary, files, before.image))
    problems = [] if after.report is None else list(after.report.problems)
    unknown = unknown_words_warning(source, request.prompt, request.negative_prompt)
    if unknown is not None:
        problems.append(f"{unknown[0].upper()}{unknown[1:]}.")
    headings, rows = report_rows([specs], [after], scale)
    return RunResult(
        before=before_file,
        after=after_file,
        difference=difference_file,
        mean_difference=difference(before.image, after.image),
        size=before.image.size,
        captions=captions,
        timing=_timing(results),
        headings=headings[1:],
        report=[row[1:] for row in rows],  # the first column names the run, and there is only one
        problems=tuple(problems),
        maps=maps,
        snippet=snippet(source, request, call_arguments(pipe, request), specs, models.dtype, models.device),
        seconds=time.perf_counter() - begun,
    )


class _Steps:
    """Counter of the steps of several runs."""

    def __init__(self, run: Run, on_step: OnStep, runs: int) -> None:
        self._run = run
        self._on_step = on_step
        self._runs = runs
        self._begun = 0

    def count(self, name: str) -> Callable[..., Any]:
        """Return the ``callback_on_step_end`` of the next run."""
        self._begun += 1
        number, steps = self._begun, self._run.settings.request.steps

        def callback(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
            self._run.check()
            calls = len(pipe.scheduler.timesteps)  # some schedulers call the denoiser twice per step
            step = min(steps, -(-(index + 1) * steps // calls))
            self._on_step(Progress(name, number, self._runs, step, steps))
            return tensors

        return callback


def _timing(results: list[tuple[str, ImageResult]]) -> list[list[str]]:
    first = results[0][1].seconds
    return [[name, f"{result.seconds:.2f}", f"{result.seconds / first:.2f}"] for name, result in results]


def _stack(sheets: list[Path]) -> Path:
    """Stack several images vertically into the file of the first one."""
    images = [Image.open(path).convert("RGB") for path in sheets]
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    whole.save(sheets[0])
    return sheets[0]
