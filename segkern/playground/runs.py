# SPDX-License-Identifier: Apache-2.0
"""One press of Draw: the pictures without and with guidance, what they took, and what is written beside them."""

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
from segkern.generation.drawing import Drawn, calls_of, describe, draw, report_rows
from segkern.generation.pictures import save
from segkern.playground.form import Settings
from segkern.playground.models import Models, Named
from segkern.playground.snippet import snippet

_BOUNDARY = "reflect"  # of the recorded energies; they are shown without a blur

Tell = Callable[[int, int, str], None]  # steps done, of all, and what is under way


class Stopped(Exception):
    """A run ended because somebody pressed Stop."""


class Run:
    """What was asked for with one press of Draw, and whether it shall stop.

    Attributes:
        named: the model.
        settings: what to draw.
        owner: the page that asked.
        begun: whether its turn has come.
    """

    def __init__(self, named: Named, settings: Settings, owner: str = "") -> None:
        self.named = named
        self.settings = settings
        self.owner = owner
        self.begun = False
        self._stop = threading.Event()

    def stop(self) -> None:
        """End it after the step that is under way, or before it begins."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether it shall stop."""
        return self._stop.is_set()

    def check(self) -> None:
        """Go on.

        Raises:
            Stopped: when it shall stop.
        """
        if self.stopping:
            raise Stopped


@dataclass(frozen=True)
class Result:
    """What a page shows of a run.

    Attributes:
        plain: PNG without guidance, its settings in it.
        guided: PNG with guidance.
        small: whether a page enlarges them.
        timing: what was drawn, its seconds, and these as a multiple of the first.
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
    problems: list[str]
    maps: Path | None
    snippet: str
    seconds: float


def carry_out(run: Run, models: Models, folder: Path, tell: Tell) -> Result:
    """Draw everything that a run asks for, one picture after the other.

    Args:
        run: which may be stopped from another thread.
        models: that draw; one run at a time.
        folder: for the files, which get a folder of their own in it.
        tell: is told after every step.

    Raises:
        ValueError: when the pipeline cannot be guided so.
        Stopped: when the run was stopped; the pipeline is as it was before.
    """
    from segkern.integrations.diffusers import guide, record_energy

    with models.lock:
        run.check()
        run.begun = True
        begun = time.perf_counter()
        settings, pipe = run.settings, models.load(run.named)
        job, specs = settings.job, settings.specs
        calls = calls_of(pipe, job.steps)
        guide(pipe, *specs).remove()  # refuses pipelines that cannot be guided
        counted = _Steps(run, tell, runs=2 + settings.unshared + bool(settings.layers))
        plain = draw(pipe, job, (), counted.of("without guidance"))
        guided = draw(pipe, job, specs, counted.of("with guidance"))
        unshared = draw(pipe, job, specs, counted.of("nothing shared"), share=False) if settings.unshared else None
        recorder = None
        if settings.layers:  # in a run of its own, so that the others take what they always take
            with record_energy(pipe, settings.layers, (), {0, calls // 2, calls - 1}, boundary=_BOUNDARY) as recorder:
                draw(pipe, job, (), counted.of("energy of attention"))

    source = models.describe(run.named).source
    files = Path(tempfile.mkdtemp(dir=folder))
    names = []
    for kind, one, guidance in (("plain", plain, ()), ("guided", guided, specs)):
        names.append(files / f"segkern-{kind}-seed-{job.seed}.png")
        save(one.image, names[-1], describe(source, job, guidance, models.dtype))
    maps = None
    if recorder is not None:
        found = report.summary(recorder, describe(source, job, (), models.dtype), _BOUNDARY)
        maps = _one_below_another(plots.plot_maps(found, files, plain.image))
    columns, rows, problems = report_rows([specs], [guided])
    return Result(
        plain=names[0],
        guided=names[1],
        small=max(plain.image.size) < 256,
        timing=_timing(plain, guided, unshared),
        headings=columns[1:],
        report=[row[1:] for row in rows],  # the first says which run, and there is one
        problems=problems,
        maps=maps,
        snippet=snippet(source, job, specs, models.dtype, models.device),
        seconds=time.perf_counter() - begun,
    )


class _Steps:
    """Counts the steps of several runs in a row."""

    def __init__(self, run: Run, tell: Tell, runs: int) -> None:
        self._run = run
        self._tell = tell
        self._runs = runs
        self._begun = 0

    def of(self, what: str) -> Callable[..., Any]:
        """The next run's ``callback_on_step_end``."""
        before, self._begun = self._begun, self._begun + 1

        def step(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
            self._run.check()
            steps = pipe.num_timesteps
            self._tell(before * steps + index + 1, self._runs * steps, what)
            return tensors

        return step


def _timing(plain: Drawn, guided: Drawn, unshared: Drawn | None) -> list[list[str]]:
    rows = [("without guidance", plain), ("with guidance", guided)]
    if unshared is not None:
        rows.append(("with guidance, nothing shared", unshared))
    return [[name, f"{one.seconds:.2f}", f"{one.seconds / plain.seconds:.2f}"] for name, one in rows]


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
