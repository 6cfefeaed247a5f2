# SPDX-License-Identifier: Apache-2.0
"""Map denoiser calls to the steps of a run by their timesteps.

A step is a timestep of the run, so several calls at one timestep (tiles, views, restarts) are one step. If the
scheduler calls the denoiser twice in each step (its ``order`` is 2: Heun, KDPM2), both calls are that step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from segkern.integrations.diffusers.runtime.pipeline_run import PipelineRun

_FLOAT32 = torch.finfo(torch.float32).eps

Units = Callable[[float], float]  # converts the scheduler's timesteps to the denoiser's


@dataclass(frozen=True)
class Step:
    """The position of a denoiser call in its run.

    Attributes:
        number: Number of the step, from 0.
        fraction: Completed fraction of the steps that this pipeline call runs. With a ``strength`` below 1,
            ``denoising_start`` or ``denoising_end``, these are only the remaining steps.
        timestep: Timestep in the scheduler's units.
        call: Number of the timestep, from 0. If the scheduler's order is 2, each step has two timesteps.
        calls: Number of timesteps in the run.
    """

    number: int
    fraction: float
    timestep: float
    call: int
    calls: int


class RunSteps:
    """The steps of one run.

    Args:
        run: The run of the pipeline or of a custom loop.
        scheduler: The pipeline's scheduler; None for a denoiser without a pipeline.
    """

    def __init__(self, run: PipelineRun, scheduler: Any) -> None:
        self._run = run
        self._tensor: torch.Tensor | None = None  # the scheduler's tensor from which the list was read
        self._timesteps: list[float] = []
        self._order = 1
        self._cutoff: float | None = None  # the run has no timesteps below this
        self._begin: int | None = None
        self._last = 0
        self._changed = False
        self._read(scheduler)

    def of_call(self, scheduler: Any, timestep: Any, units: Units) -> Step:
        """Return the step of a call.

        Args:
            scheduler: The pipeline's scheduler.
            timestep: The denoiser's timestep, a number or a tensor of equal values. It is read from its device unless
                it is an element of the scheduler's timesteps.
            units: Converts the scheduler's timesteps to the denoiser's.

        Raises:
            ValueError: If the run does not have this timestep.
        """
        self._read(scheduler)
        position = self._position(scheduler, timestep, units)
        if self._begin is None:
            self._begin = position - position % self._order
            if self._changed and self._begin > 0:
                raise ValueError(
                    "the timesteps of the scheduler were replaced within a run, so guidance that depends on the step "
                    "has no defined step; do not use start, stop, schedule, reuse or adaptive_scale"
                )
        end = self._begin + self._calls(self._begin)
        if not self._begin <= position < end:
            raise self._unknown(self._timesteps[position])
        self._last = position
        call, calls = position - self._begin, end - self._begin
        number, steps = call // self._order, -(-calls // self._order)
        return Step(number, number / steps, self._timesteps[position], call, calls)

    def _read(self, scheduler: Any) -> None:
        """Read the timesteps if they have changed."""
        given: Any = self._run.timesteps
        if given is None:
            given = scheduler.timesteps
        if given is self._tensor and self._timesteps:
            return
        timesteps = [float(t) for t in (given.tolist() if isinstance(given, torch.Tensor) else given)]
        self._tensor = given
        if timesteps == self._timesteps:
            return
        self._changed = bool(self._timesteps)
        self._timesteps, self._begin, self._last = timesteps, None, 0
        of_scheduler = getattr(scheduler, "timesteps", None)
        own = self._run.timesteps is None or (of_scheduler is not None and [*map(float, of_scheduler)] == timesteps)
        self._order = int(getattr(scheduler, "order", 1)) if own else 1
        self._cutoff = cutoff_of(self._run, scheduler)

    def _calls(self, begin: int) -> int:
        """Return how many timesteps the run has from ``begin`` on."""
        return sum(self._cutoff is None or timestep >= self._cutoff for timestep in self._timesteps[begin:])

    def _position(self, scheduler: Any, timestep: Any, units: Units) -> int:
        stored = _position_in(self._tensor, timestep)
        if stored is not None and stored < len(self._timesteps):
            return stored
        value, precision = timestep_value(timestep)
        # A custom loop may use the denoiser's timesteps.
        errors = [min(abs(units(t) - value), abs(t - value)) for t in self._timesteps]
        rounding = max(4.0 * _FLOAT32 * max(1.0, abs(value)), precision * abs(value))
        if not min(errors, default=math.inf) <= rounding:
            raise self._unknown(value)
        limit = rounding if precision > _FLOAT32 else min(errors)
        candidates = [position for position, error in enumerate(errors) if error <= limit]
        if len(candidates) == 1:
            return candidates[0]
        # Heun's method repeats timesteps, and others are equal in bfloat16. The scheduler knows the current index.
        for name in ("step_index", "begin_index"):
            index = getattr(scheduler, name, None)
            if index is not None and int(index) in candidates:
                return int(index)
        return next((position for position in candidates if position >= self._last), candidates[0])

    def _unknown(self, value: float) -> ValueError:
        shown = ", ".join(f"{t:g}" for t in self._timesteps[:4])
        return ValueError(
            f"the denoiser was called at timestep {value:g}, which is none of the {len(self._timesteps)} of this run "
            f"({shown}, ...), so guidance that depends on the step has no defined strength; do not use start, stop, "
            f"schedule, reuse or adaptive_scale"
        )


def steps_of(run: PipelineRun, scheduler: Any) -> RunSteps:
    """Return the steps of a run. All guidance in a run shares them."""
    steps = run.state.get(RunSteps)
    if steps is None:
        steps = run.state[RunSteps] = RunSteps(run, scheduler)
    return steps


def cutoff_of(run: PipelineRun, scheduler: Any) -> float | None:
    """Return the lowest timestep of a run with ``denoising_end``; None without it.

    Source: diffusers' Stable Diffusion XL pipelines.
    """
    end = run.setting("denoising_end")
    if not (isinstance(end, float) and 0.0 < end < 1.0):
        return None
    train_timesteps = scheduler.config.num_train_timesteps
    return float(round(train_timesteps - end * train_timesteps))


def timestep_value(timestep: Any) -> tuple[float, float]:
    """Return the denoiser's timestep, and the relative precision of its dtype.

    Args:
        timestep: A number, a tensor with one value per sample, or a tensor with one value per token of each sample, in
            which tokens of a given image are 0. Synchronises with the tensor's device.

    Raises:
        ValueError: If samples have different timesteps.
    """
    if not isinstance(timestep, torch.Tensor):
        return float(timestep), _FLOAT32
    check_one_timestep(timestep)
    precision = max(_FLOAT32, torch.finfo(timestep.dtype).eps) if timestep.is_floating_point() else _FLOAT32
    return float(_of_samples(timestep)[0]), precision


def check_one_timestep(timestep: Any) -> None:
    """Raise a ValueError if samples have different timesteps. Synchronises with the device of several values."""
    if not isinstance(timestep, torch.Tensor) or timestep.is_meta or _is_one_number(timestep):
        return
    values = _of_samples(timestep)
    if not bool((values == values[0]).all()):
        raise ValueError(
            f"the samples of the denoiser's batch have different timesteps, {values.tolist()}; guide needs the same "
            f"timestep for all samples"
        )


def _of_samples(timestep: torch.Tensor) -> torch.Tensor:
    """Return the timestep of each sample."""
    return timestep.detach().flatten(1).amax(1) if timestep.ndim > 1 else timestep.detach().reshape(-1)


def same_timestep(first: Any, second: Any) -> bool:
    """Return True if two denoiser calls have the same timestep. Synchronises with the device of different tensors."""
    if first is second:
        return True
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.is_meta or second.is_meta:
            return True
        one, other = ((x.untyped_storage().data_ptr(), x.storage_offset(), x.dtype) for x in (first, second))
        if one == other and _is_one_number(first) and _is_one_number(second):
            return True
    return timestep_value(first)[0] == timestep_value(second)[0]


def _is_one_number(timestep: torch.Tensor) -> bool:
    """Return True if all elements of the tensor share one memory location."""
    return all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))


def _position_in(timesteps: Any, timestep: Any) -> int | None:
    """Return the position of a timestep that is a view of the scheduler's timesteps; None if it is not."""
    if not (isinstance(timesteps, torch.Tensor) and isinstance(timestep, torch.Tensor)):
        return None
    if timesteps.is_meta or timestep.is_meta or timesteps.dtype != timestep.dtype or timesteps.ndim != 1:
        return None
    if not _is_one_number(timestep) or timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    position, rest = divmod(int(timestep.storage_offset() - timesteps.storage_offset()), max(1, timesteps.stride(0)))
    return position if not rest and 0 <= position < len(timesteps) else None
