# SPDX-License-Identifier: Apache-2.0
"""The ``--prompts`` option of ``segkern generate``: a folder of images, generated in batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import typer

from segkern.cli.terminal import Problems, StepProgress, fail
from segkern.generation.engine import BatchSize, Job, Outcome, generate_images, largest_batch
from segkern.generation.image_folder import FAILURES, ImageFolder, OtherSettingsError
from segkern.generation.processes import Processes
from segkern.generation.prompt_files import Row, read_rows
from segkern.generation.row_jobs import RowSettings

_FIRST_PROMPTS = 1000


def parse_batch_size(text: str) -> BatchSize:
    """Return the value of ``--batch-size``.

    Raises:
        ValueError: If it is neither ``auto`` nor a positive integer.
    """
    if text == "auto":
        return "auto"
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"--batch-size must be auto or an integer of at least 1, got {text!r}")
    return int(text)


def first_prompts(path: Path) -> Iterator[str]:
    """Yield the first prompts of a file, to check them before images are generated."""
    return (row.settings["prompt"] for row in islice(read_rows(path), _FIRST_PROMPTS) if not row.error)


class ManyImages:
    """One run of ``segkern generate --prompts`` in one process.

    Args:
        pipe: Pipeline.
        settings: Settings of the images.
        folder: Output folder.
        processes: The processes that share the images.
        batch_size: Images per batch.
        total: Number of images of all processes.
    """

    def __init__(
        self,
        pipe: Any,
        settings: RowSettings,
        folder: ImageFolder,
        processes: Processes,
        batch_size: BatchSize,
        total: int,
    ) -> None:
        self._pipe = pipe
        self._settings = settings
        self._folder = folder
        self._processes = processes
        self._batch_size = batch_size
        self._total = total
        self._done = self._written = self._failed = 0
        self._problems = Problems()

    def generate(self, path: Path) -> None:
        """Generate the missing images of a prompt file, and exit with code 1 if an image failed.

        If files cannot be written, for example because the disk is full, the run stops.
        """
        request = self._settings.request
        with StepProgress(self._processes.is_main) as progress:
            progress.begin("generating", request.steps)
            try:
                for outcome in generate_images(self._pipe, self._missing(path), self._batch_size, on_step=progress):
                    self._keep(outcome)
            except OtherSettingsError as error:
                fail(error)
            except OSError as error:
                typer.echo(f"segkern: stopped: {error}; repeat the command to generate the missing images", err=True)
                raise typer.Exit(1) from None
        self._problems.warn()
        written, failed = self._processes.finish(self._written, self._failed)
        if self._processes.is_main and not written and not failed:
            typer.echo(f"{self._folder.path} already contains all images")
        if failed:
            if self._processes.is_main:
                typer.echo(f"segkern: {failed} failed; see {self._folder.path / FAILURES}", err=True)
            raise typer.Exit(1)

    def _missing(self, path: Path) -> Iterator[Job]:
        """Yield the images that this process has claimed and that the folder does not contain."""
        images, rows = self._settings.images, read_rows(path)
        # A block has the images of a whole number of lines, and fills a batch.
        lines = -(-largest_batch(self._batch_size, self._processes.device.type) // images)
        block = 0
        while part := list(islice(rows, lines)):
            if self._processes.claim(block):
                for row in part:
                    yield from self._missing_of_row(row)
            block += 1

    def _missing_of_row(self, row: Row) -> Iterator[Job]:
        try:
            jobs = list(self._settings.jobs(row, self._pipe))
        except ValueError as error:
            self._done += self._settings.images
            self._add_failure(f"line {row.number}", line=row.number, reason=str(error))
            return
        for job in jobs:
            if self._folder.contains(job):
                self._done += 1
            else:
                yield job

    def _keep(self, outcome: Outcome) -> None:
        job, self._done = outcome.job, self._done + 1
        if outcome.result is None:
            request = job.request
            self._add_failure(job.name, name=job.name, prompt=request.prompt, seed=request.seed, reason=outcome.reason)
            return
        self._folder.write(job, outcome.result)
        self._problems.add(outcome.result.report)
        self._written += 1
        count = (
            f"{self._done}{self._processes.place}" if self._processes.count > 1 else f"{self._done} of {self._total}"
        )
        typer.echo(f"wrote {self._folder.path / job.name}.png ({count})")

    def _add_failure(self, what: str, reason: str, **details: object) -> None:
        self._failed += 1
        self._folder.add_failure(**details, reason=reason)
        typer.echo(f"failed: {what}: {reason}", err=True)
