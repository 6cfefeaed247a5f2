# SPDX-License-Identifier: Apache-2.0
"""A worker of a Ray cluster: a process with a pipeline that generates blocks of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segkern.generation import loading
from segkern.generation.drawing import image_metadata
from segkern.generation.engine import BatchSize, Job
from segkern.generation.image_events import Event, image_events
from segkern.generation.image_folder import ImageFolder
from segkern.generation.options import make_specs
from segkern.generation.prompt_files import Row
from segkern.generation.row_jobs import RowSettings
from segkern.generation.shards import Shards
from segkern.generation.storage import open_folder
from segkern.version import __version__

MARKER = ".segkern-run"  # file with a token, by which workers recognise the output folder


@dataclass(frozen=True)
class WorkerPlan:
    """Everything that a worker needs, apart from its lines.

    Attributes:
        model: Model, as in :func:`segkern.generation.loading.find_model`.
        config: Configuration of a single file.
        dtype: Value of ``--dtype``.
        on_gpu: Whether the worker uses a GPU.
        settings: Settings of the images.
        batch_size: Images per batch.
        out: Output folder or URL.
        token: Content of the marker in the output folder.
        overwrite: Whether to replace images with other settings.
        sharded: Whether to write shards.
    """

    model: str
    config: str | None
    dtype: str
    on_gpu: bool
    settings: RowSettings
    batch_size: BatchSize
    out: str
    token: str
    overwrite: bool
    sharded: bool


class Worker:
    """The class of the Ray actors."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan

    def load(self) -> str:
        """Load the pipeline, and return the version of segkern.

        Raises:
            OSError: If files of the model are missing.
            ValueError: If this node cannot use the model, the device or the output folder.
        """
        from segkern.integrations.diffusers import guide

        plan, settings = self._plan, self._plan.settings
        loading.quiet_libraries()
        device = loading.find_device("cuda" if plan.on_gpu else "cpu")
        dtype = loading.find_dtype(plan.dtype, device)
        folder = open_folder(plan.out)
        if folder.read(MARKER) != plan.token.encode():
            raise ValueError(f"--out {plan.out!r} is not the same folder as on the node of the command")
        source = loading.find_model(plan.model, plan.config)
        pipe = loading.load_pipeline(source, dtype, device)
        specs = make_specs(settings.scales, settings.layers, settings.sigma)
        if specs:
            guide(pipe, *specs).remove()  # raises a ValueError if the pipeline is not supported

        def metadata(job: Job) -> dict[str, object]:
            return image_metadata(source, job.request, job.specs, dtype, pipe.scheduler)

        self._pipe: Any = pipe
        self._images = (Shards if plan.sharded else ImageFolder)(folder, metadata, plan.overwrite)
        return __version__

    def generate(self, number: int, rows: Sequence[Row], skip: Mapping[str, str], announce: bool) -> Iterator[Event]:
        """Generate the missing images of a block of lines; see :func:`image_events`."""
        plan = self._plan
        with self._images.block(number) as target:
            yield from image_events(
                self._pipe, plan.settings, target, rows, plan.batch_size, skip=skip, announce=announce
            )
