# SPDX-License-Identifier: Apache-2.0
"""Generation of many images in batches."""

from __future__ import annotations

import gc
import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from segkern.generation.calls import execution_device
from segkern.generation.drawing import ImageRequest, ImageResult, SharedNoiseError, Specs, draw_batch

if TYPE_CHECKING:
    from segkern.integrations.specs.base import Spec

BatchSize = int | Literal["auto"]

_LARGEST = {"cuda": 32}  # batch sizes that "auto" tries first; larger batches are hardly faster
_LARGEST_ELSEWHERE = 8
_WAITING = 16  # batches of jobs that wait for compatible jobs, at most
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """An image to generate.

    Attributes:
        request: Settings of the image.
        specs: Guidance specs; empty for no guidance.
        name: Any name, such as that of the output file.
    """

    request: ImageRequest
    specs: Specs = ()
    name: str = ""


@dataclass(frozen=True)
class Outcome:
    """The image of a job, or the reason why there is none.

    Attributes:
        job: The job.
        result: Image and guidance report; None on failure.
        reason: Why the image could not be generated; empty on success.
    """

    job: Job
    result: ImageResult | None
    reason: str = ""


def generate_images(
    pipe: Any, jobs: Iterable[Job], batch_size: BatchSize = 1, *, on_step: Callable[..., Any] | None = None
) -> Iterator[Outcome]:
    """Generate images in batches, and yield one outcome per job.

    Jobs share a batch if they have the same size, number of steps and guidance scales. Prompts, seeds and finite sigmas
    of SEG may differ. Outcomes are in the order of the jobs if all jobs are compatible.

    An image depends only on its own job. A batch with too few jobs is filled with copies of its last job, which are not
    returned, because rounding depends on the size of a batch. With one batch size, an image therefore has the same
    latents in any order and with any other jobs, if the pipeline pads all prompts to the same length.

    Jobs are read only as needed, and neither jobs nor outcomes are kept. If a batch does not fit in memory, the batch
    size is halved for images of this size. If a batch fails for another reason, it is generated in halves, so one
    faulty job does not affect the others.

    Args:
        pipe: Text-to-image pipeline.
        jobs: Images to generate. The iterable can be a generator of any length.
        batch_size: Number of images per batch. ``"auto"`` starts at 32 on a GPU and 8 elsewhere.
        on_step: Function for diffusers' ``callback_on_step_end``.

    Raises:
        ValueError: If the batch size is invalid.
        torch.AcceleratorError: If the GPU failed, because it cannot generate further images.

    Example:
        >>> from segkern.generation.loading import find_model, load_pipeline
        >>> import torch
        >>> pipe = load_pipeline(find_model("demo"), torch.float32, torch.device("cpu"))
        >>> jobs = [Job(ImageRequest("fox", "", 32, 32, seed, 1, 5.0)) for seed in range(3)]
        >>> [outcome.result.image.size for outcome in generate_images(pipe, jobs, batch_size=2)]
        [(32, 32), (32, 32), (32, 32)]
    """
    batches = _Batches(pipe, batch_size, on_step)
    return _grouped(batches, jobs)


def largest_batch(batch_size: BatchSize, device_type: str) -> int:
    """Return the number of images in the first batch.

    Raises:
        ValueError: If the batch size is neither a positive integer nor ``"auto"``.
    """
    if batch_size == "auto":
        return _LARGEST.get(device_type, _LARGEST_ELSEWHERE)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"the batch size must be 'auto' or an integer of at least 1, got {batch_size!r}")
    return batch_size


def _grouped(batches: _Batches, jobs: Iterable[Job]) -> Iterator[Outcome]:
    """Collect compatible jobs until they fill a batch, and yield the outcomes of the batch."""
    groups: dict[Hashable, list[Job]] = {}  # the oldest group is first
    waiting = 0
    for job in jobs:
        key = _compatibility(job)
        groups.setdefault(key, []).append(job)
        waiting += 1
        if len(groups[key]) < batches.limit(job):
            if waiting < _WAITING * batches.largest:
                continue
            key = next(iter(groups))
        group = groups.pop(key)
        waiting -= len(group)
        yield from batches.run(group)
    for group in groups.values():
        yield from batches.run(group)


class _Batches:
    """Batches of one pipeline, with the batch sizes that fit in memory."""

    def __init__(self, pipe: Any, batch_size: BatchSize, on_step: Callable[..., Any] | None) -> None:
        self._pipe = pipe
        self._on_step = on_step
        self._device_type = execution_device(pipe).type
        self._is_auto = batch_size == "auto"
        self.largest = largest_batch(batch_size, self._device_type)
        self._limits: dict[tuple[int, int], int] = {}  # by width and height

    def limit(self, job: Job) -> int:
        """Return the number of images in a batch of the job's size."""
        size = job.request.width, job.request.height
        return min(self.largest, self._limits.get(size, self.largest))

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Generate the images of compatible jobs."""
        waiting = deque([list(jobs)])
        while waiting:
            batch = waiting.popleft()
            limit = self.limit(batch[0])
            if len(batch) > limit:
                waiting.extendleft([batch[limit:], batch[:limit]])
                continue
            results, reason = self._attempt(batch, limit)
            if results is None and self.limit(batch[0]) < limit:
                waiting.appendleft(batch)
                continue
            half = len(batch) // 2
            if results is None and half:
                waiting.extendleft([batch[half:], batch[:half]])
                continue
            if results is None and limit > 1:  # the batch can be the cause, for example its memory
                results, reason = self._attempt(batch, 1)
            if results is None:
                yield Outcome(batch[0], None, reason)
            else:
                yield from (Outcome(job, result) for job, result in zip(batch, results, strict=True))

    def _attempt(self, batch: Sequence[Job], size: int) -> tuple[list[ImageResult] | None, str]:
        """Return the images of a batch, or the reason of a failure. Lower the limit if it was too high.

        Args:
            batch: Jobs.
            size: Number of images to generate in the pipeline call, at least the number of jobs.
        """
        import torch

        try:
            return self._results(batch, size), ""
        except SharedNoiseError as error:
            self.largest = 1
            _log.warning("generating images one by one: %s", error)
            return None, str(error)
        except Exception as error:  # a failure of one image must not end the run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            out_of_memory = _is_out_of_memory(error)
            if isinstance(error, torch.AcceleratorError) and not out_of_memory:
                raise
        # The exception, whose traceback holds the tensors of the failed batch, no longer exists here.
        gc.collect()
        if self._device_type == "cuda":
            torch.cuda.empty_cache()
        if out_of_memory and size > 1:
            request = batch[0].request
            self._limits[request.width, request.height] = size // 2
            if not self._is_auto:
                _log.warning(
                    "%d images of %d x %d do not fit in memory; using batches of %d",
                    *(size, request.width, request.height, size // 2),
                )
        return None, reason

    def _results(self, batch: Sequence[Job], size: int) -> list[ImageResult]:
        # The last job fills the batch. Rounding depends on the size of a batch, but not on its other images.
        full = [*batch, *[batch[-1]] * (size - len(batch))]
        results = draw_batch(
            self._pipe, [job.request for job in full], _merged([job.specs for job in full]), self._on_step
        )
        share = size / len(batch)
        return [
            _with_own_specs(replace(result, seconds=result.seconds * share), job.specs)
            for result, job in zip(results, batch, strict=False)
        ]


def _compatibility(job: Job) -> Hashable:
    """Return a key that is equal for jobs that can share a batch."""
    request = job.request
    # Some pipelines treat a missing negative prompt and an empty one differently, and a batch has them for all images.
    settings = (request.width, request.height, request.steps, request.guidance_scale, bool(request.negative_prompt))
    return settings, tuple(replace(spec, sigma=1.0) if _is_mergeable(spec) else spec for spec in job.specs)  # type: ignore[type-var]


def _is_mergeable(spec: Spec) -> bool:
    """Return True if the spec can have one sigma per image.

    A sigma of 0 would change the number of denoiser calls. With infinite sigma, a layer is computed in another way.
    """
    from segkern.integrations.specs import SEG

    if not isinstance(spec, SEG) or spec.query_stride not in (1, (1, 1)):
        return False
    return isinstance(spec.sigma, float) and 0 < spec.sigma < math.inf


def _merged(specs: Sequence[Specs]) -> Specs:
    """Return the specs of a batch, with one sigma per image where they differ."""
    return tuple(_merged_spec(column) for column in zip(*specs, strict=True))


def _merged_spec(specs: Sequence[Any]) -> Spec:
    first: Spec = specs[0]
    if all(spec == first for spec in specs):
        return first
    return replace(first, sigma=tuple(spec.sigma for spec in specs))  # type: ignore[type-var]


def _with_own_specs(result: ImageResult, specs: Specs) -> ImageResult:
    """Return the result with the specs of its own job in the report instead of those of the batch."""
    report = result.report
    if report is None or report.specs == specs:
        return result
    problems = report.problems
    for ours, own in zip(report.specs, specs, strict=True):
        problems = tuple(problem.replace(f"{ours} ", f"{own} ", 1) for problem in problems)
    return replace(result, report=replace(report, specs=specs, problems=problems))


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)
