# SPDX-License-Identifier: Apache-2.0
"""Generation of the images of a prompt file: each line becomes jobs, and each job becomes an event."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from segkern.generation.engine import BatchSize, Outcome, generate_images
from segkern.generation.image_folder import Target
from segkern.generation.prompt_files import Row
from segkern.generation.row_jobs import RowSettings

if TYPE_CHECKING:
    from segkern.integrations.diffusers import Report


@dataclass(frozen=True)
class Event:
    """A change in the state of an image.

    Attributes:
        kind: ``"begun"``, ``"present"`` if the image existed, ``"written"`` or ``"failed"``.
        name: Name of the image, or ``"line 3"`` if no image of the line can be generated.
        images: Number of images.
        reason: Why the image failed; empty otherwise.
        details: Further information about a failed image, for the list of failures.
        report: Guidance report; None if it contains no problems.
    """

    kind: Literal["begun", "present", "written", "failed"]
    name: str
    images: int = 1
    reason: str = ""
    details: Mapping[str, object] = field(default_factory=dict)
    report: Report | None = None


def image_events(
    pipe: Any,
    settings: RowSettings,
    target: Target,
    rows: Iterable[Row],
    batch_size: BatchSize,
    *,
    on_step: Callable[..., Any] | None = None,
    skip: Mapping[str, str] | None = None,
    announce: bool = False,
) -> Iterator[Event]:
    """Generate the missing images of the rows, write them, and yield events.

    Args:
        pipe: Pipeline.
        settings: Settings of the images.
        target: Place for the images.
        rows: Lines of a prompt file.
        batch_size: Images per batch.
        on_step: Function for diffusers' ``callback_on_step_end``.
        skip: Names of images not to generate, with the reason of their failure.
        announce: Whether to generate images one by one, with an event before each.

    Raises:
        OtherSettingsError: If an image with other settings exists.
        OSError: If a file cannot be written.
    """
    events: deque[Event] = deque()

    def missing() -> Iterator[Any]:
        for row in rows:
            try:
                jobs = list(settings.jobs(row, pipe))
            except ValueError as error:
                name, details = f"line {row.number}", {"line": row.number}
                events.append(Event("failed", name, settings.images, reason=str(error), details=details))
                continue
            for job in jobs:
                if skip and job.name in skip:
                    events.append(_event(Outcome(job, None, skip[job.name])))
                elif target.contains(job):
                    events.append(Event("present", job.name))
                else:
                    yield job

    def waiting() -> Iterator[Event]:
        while events:
            yield events.popleft()

    def finished(outcomes: Iterable[Outcome]) -> Iterator[Event]:
        for outcome in outcomes:
            if outcome.result is not None:
                target.write(outcome.job, outcome.result)
            yield from waiting()
            yield _event(outcome)

    if announce:
        for job in missing():
            yield Event("begun", job.name)
            yield from finished(generate_images(pipe, [job], on_step=on_step))
    else:
        yield from finished(generate_images(pipe, missing(), batch_size, on_step=on_step))
    yield from waiting()


def _event(outcome: Outcome) -> Event:
    job = outcome.job
    if outcome.result is None:
        details = {"name": job.name, "prompt": job.request.prompt, "seed": job.request.seed}
        return Event("failed", job.name, reason=outcome.reason, details=details)
    report = outcome.result.report
    return Event("written", job.name, report=report if report is not None and report.problems else None)
