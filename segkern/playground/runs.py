# SPDX-License-Identifier: Apache-2.0
"""One press of Draw: pictures without and with guidance, their times, their report and their program."""

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
from segkern.generation.drawing import ImageResult, denoiser_calls, draw, image_metadata, report_rows
from segkern.generation.loading import Source
from segkern.generation.pictures import save
from segkern.playground.form import Settings
from segkern.playground.models import Models
from segkern.playground.snippet import snippet

_BOUNDARY = "reflect"  # of the recorded energies; they are shown without a blur

OnStep = Callable[[int, int, str], None]  # steps done, of all, and the name of the run under way


class Stopped(Exception):
    """A run ended because somebody pressed Stop."""


class Run:
    """Settings of one press of Draw, and whether the run shall stop.

    Attributes:
        source: of the model.
        settings: what to draw.
        owner: the page that asked.
        begun: whether its turn has come.
    """

    def __init__(self, source: Source, settings: Settings, owner: str = "") -> None:
        self.source = source
        self.settings = settings
        self.owner = owner
        self.begun = False
        self._stop = threading.Event()

    def stop(self) -> None:
        """End it after the step that is under way, or before it begins."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """True once somebody has stopped it."""
        return self._stop.is_set()

    def check(self) -> None:
        """Go on.

        Raises:
            Stopped: when it shall stop.
        """
        if self.stopping:
            raise Stopped


@dataclass(frozen=True)
class RunResult:
    """Everything that a page shows of a run.

    Attributes:
        plain: PNG without guidance, its settings in it.
        guided: PNG with guidance.
        small: whether a page enlarges them.
        timing: a picture's name, its seconds, and these as a multiple of the first picture's.
        headings: of the report.
        report: a row for each guidance and layer.
        problems: of the guidance, in sentences.
        maps: PNG of the energy of attention; None if that was not asked for.
        snippet: Python that draws the guided picture again.
        seconds: of everything.
    """

    plain: Path
    guided: Path
    small: bool
    timing: list[list[str]]
    headings: list[str]
    report: list[list[str]]
    problems: tuple[str, ...]
    maps: Path | None
    snippet: str
    seconds: float


def carry_out(run: Run, models: Models, folder: Path, on_step: OnStep) -> RunResult:
    """Draw everything that a run asks for, one picture after the other.

    Args:
        run: which may be stopped from another thread.
        models: that draw; one run at a time.
        folder: for the files, which get a folder of their own in it.
        on_step: is called after every step.

    Raises:
        ValueError: when the pipeline cannot be guided so.
        Stopped: when the run was stopped; the pipeline is as it was before.
    """
    from segkern.integrations.diffusers import guide, record_energy

    with models.lock:
        run.check()
        run.begun = True
        begun = time.perf_counter()
        settings, pipe = run.settings, models.load(run.source)
        request, specs = settings.request, settings.specs
        calls = denoiser_calls(pipe, request.steps)
        guide(pipe, *specs).remove()  # refuses pipelines that cannot be guided
        steps = _Steps(run, on_step, runs=2 + settings.unshared + bool(settings.layers))
        plain = draw(pipe, request, (), steps.count("without guidance"))
        guided = draw(pipe, request, specs, steps.count("with guidance"))
        results = {"without guidance": plain, "with guidance": guided}
        if settings.unshared:
            results["with guidance, nothing shared"] = draw(
                pipe, request, specs, steps.count("nothing shared"), share=False
            )
        recorder = None
        if settings.layers:  # in a run of its own, so that the others take the time they always take
            with record_energy(pipe, settings.layers, (), {0, calls // 2, calls - 1}, boundary=_BOUNDARY) as recorder:
                draw(pipe, request, (), steps.count("energy of attention"))

    source = run.source
    files = Path(tempfile.mkdtemp(dir=folder))
    plain_file, guided_file = (files / f"segkern-{name}-seed-{request.seed}.png" for name in ("plain", "guided"))
    plain_metadata = image_metadata(source, request, (), models.dtype)
    save(plain.image, plain_file, plain_metadata)
    save(guided.image, guided_file, image_metadata(source, request, specs, models.dtype))
    maps = None
    if recorder is not None:
        summary = report.summary(recorder, plain_metadata, _BOUNDARY)
        maps = _one_below_another(plots.plot_maps(summary, files, plain.image))
    headings, rows = report_rows([specs], [guided], request.guidance_scale)
    return RunResult(
        plain=plain_file,
        guided=guided_file,
        small=max(plain.image.size) < 256,
        timing=_timing(results),
        headings=headings[1:],
        report=[row[1:] for row in rows],  # the first names the run, and there is one
        problems=() if guided.report is None else guided.report.problems,
        maps=maps,
        snippet=snippet(source, request, specs, models.dtype, models.device),
        seconds=time.perf_counter() - begun,
    )


class _Steps:
    """Counts the steps of several runs in a row."""

    def __init__(self, run: Run, on_step: OnStep, runs: int) -> None:
        self._run = run
        self._on_step = on_step
        self._runs = runs
        self._begun = 0

    def count(self, name: str) -> Callable[..., Any]:
        """The next run's ``callback_on_step_end``."""
        before, self._begun = self._begun, self._begun + 1

        def callback(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
            self._run.check()
            steps = pipe.num_timesteps
            self._on_step(before * steps + index + 1, self._runs * steps, name)
            return tensors

        return callback


def _timing(results: dict[str, ImageResult]) -> list[list[str]]:
    first, *_ = results.values()
    return [
        [name, f"{result.seconds:.2f}", f"{result.seconds / first.seconds:.2f}"] for name, result in results.items()
    ]


def _one_below_another(sheets: list[Path]) -> Path:
    """Several pictures as one, in the place of the first."""
    images = [Image.open(path).convert("RGB") for path in sheets]
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    whole.save(sheets[0])
    return sheets[0]
