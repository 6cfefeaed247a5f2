# SPDX-License-Identifier: Apache-2.0
"""The ``--prompts`` option of ``segkern generate``: a folder of images, generated in batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import typer

from segkern.cli.terminal import Problems, StepProgress, fail
from segkern.generation.engine import BatchSize, largest_batch
from segkern.generation.image_events import Event, image_events
from segkern.generation.image_folder import ImageFolder, Metadata, OtherSettingsError, to_json
from segkern.generation.processes import Processes
from segkern.generation.prompt_files import Row, read_rows
from segkern.generation.row_jobs import RowSettings
from segkern.generation.storage import FAILURES, Folder

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


def first_prompts(location: str) -> Iterator[str]:
    """Yield the first prompts and negative prompts of a file, to check them before images are generated."""
    for row in islice(read_rows(location), _FIRST_PROMPTS):
        yield from (row.settings[name] for name in ("prompt", "negative_prompt") if name in row.settings)


class Tally:
    """Counts and prints the images of a run.

    Args:
        folder: Output folder.
        total: Number of images; None if it is unknown.
        place: Text to print after the count.
    """

    def __init__(self, folder: Folder, total: int | None, place: str = "") -> None:
        self._folder = folder
        self._of = f" of {total}" if total is not None else ""
        self._place = place
        self.done = self.written = self.failed = 0
        self._problems = Problems()

    def add(self, event: Event, *, show: bool = True) -> None:
        """Count an image. Print it if it was written and ``show`` is true, or if it failed."""
        self.done += event.images
        if event.kind == "written":
            self.written += 1
            self._problems.add(event.report)
            if show:
                self.print(f"{event.name}.png")
        elif event.kind == "failed":
            self.failed += 1
            self._folder.add_failure(to_json({**event.details, "reason": event.reason}, lines=True).decode())
            typer.echo(f"failed: {event.name}: {event.reason}", err=True)

    def print(self, name: str) -> None:
        """Print that a file was written."""
        typer.echo(f"wrote {self._folder.place(name)} ({self.done}{self._of}{self._place})")

    def finish(self) -> None:
        """Print the problems of guidance, and finish the list of failures."""
        self._problems.warn()
        self._folder.close()

    def stop(self, error: Exception) -> typer.Exit:
        """Print why no further images can be generated, and return the exception that ends the run."""
        with suppress(OSError):  # the list of failures may be where no file can be written
            self.finish()
        typer.echo(f"segkern: stopped: {error}; repeat the command to generate the missing images", err=True)
        return typer.Exit(1)

    def conclude(self, written: int, failed: int) -> None:
        """Print the result of all processes."""
        if not written and not failed:
            typer.echo(f"{self._folder.place('')} already contains all images")
        if failed:
            typer.echo(f"segkern: {failed} failed; see {self._folder.place(FAILURES)}", err=True)


class ManyImages:
    """One run of ``segkern generate --prompts`` in one process.

    Args:
        pipe: Pipeline.
        settings: Settings of the images.
        folder: Output folder.
        metadata: Function that returns the settings of a job by name.
        overwrite: Whether to replace images with other settings.
        processes: The processes that share the images.
        batch_size: Images per batch.
        total: Number of images of all processes; None if it is unknown.
    """

    def __init__(
        self,
        pipe: Any,
        settings: RowSettings,
        folder: Folder,
        metadata: Metadata,
        overwrite: bool,
        processes: Processes,
        batch_size: BatchSize,
        total: int | None,
    ) -> None:
        self._pipe = pipe
        self._settings = settings
        self._images = ImageFolder(folder, metadata, overwrite)
        self._processes = processes
        self._batch_size = batch_size
        # Each process counts only its own images.
        several = processes.count > 1
        self._tally = Tally(folder, None if several else total, processes.place)

    def generate(self, location: str) -> None:
        """Generate the missing images of a prompt file, and exit with code 1 if an image failed.

        If files cannot be written, for example because the disk is full, the run stops.
        """
        settings, tally = self._settings, self._tally
        with StepProgress(self._processes.is_main) as progress:
            progress.begin("generating", settings.request.steps)
            try:
                rows = self._claimed(location)
                for event in image_events(self._pipe, settings, self._images, rows, self._batch_size, on_step=progress):
                    tally.add(event)
            except OtherSettingsError as error:
                fail(error)
            except OSError as error:
                raise tally.stop(error) from None
        tally.finish()
        written, failed = self._processes.finish(tally.written, tally.failed)
        if self._processes.is_main:
            tally.conclude(written, failed)
        if failed:
            raise typer.Exit(1)

    def _claimed(self, location: str) -> Iterator[Row]:
        """Yield the lines that this process has claimed."""
        rows = read_rows(location)
        # A block has the images of a whole number of lines, and fills a batch.
        lines = -(-largest_batch(self._batch_size, self._processes.device.type) // self._settings.images)
        block = 0
        while part := list(islice(rows, lines)):
            if self._processes.claim(block):
                yield from part
            block += 1
