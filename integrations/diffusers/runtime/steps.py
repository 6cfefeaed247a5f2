# SPDX-License-Identifier: Apache-2.0
"""Locate calls of the denoiser in their run by their timesteps.

A step is a timestep of the run, so that several calls at one timestep (tiles, views, restarts) are one step. Where the
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

Units = Callable[[float], float]  # from the scheduler's timesteps to the denoiser's


@dataclass(frozen=True)
class Step:
    """The place of one call of the denoiser in its run.

    Attributes:
        number: of the step, from 0.
        fraction: the same, of all steps that the call of the pipeline runs: with a ``strength`` below 1, or with
            ``denoising_start`` and ``denoising_end``, of those that are left.
        timestep: in the scheduler's units.
        call: number of the timestep, from 0; where the scheduler's order is 2 there are two for each step.
        calls: how many timesteps the run takes.
    """

    number: int
    fraction: float
    timestep: float
    call: int
    calls: int


class RunSteps:
    """The steps of one run.

    Args:
        run: of the pipeline, or of a loop with timesteps of its own.
        scheduler: of the pipeline; None for a denoiser alone.
    """

    def __init__(self, run: PipelineRun, scheduler: Any) -> None:
        self._run = run
        self._tensor: torch.Tensor | None = None  # the scheduler's, from which the list was read
        self._timesteps: list[float] = []
        self._order = 1
        self._cutoff: float | None = None  # a timestep below which the run takes none
        self._begin: int | None = None
        self._last = 0
        self._changed = False
        self._read(scheduler)

    def of_call(self, scheduler: Any, timestep: Any, units: Units) -> Step:
        """The step of a call.

        Args:
            scheduler: of the pipeline.
            timestep: as the denoiser gets it, a number or a tensor of equal ones. Read from its device, but where
                it is an element of the scheduler's timesteps.
            units: to the denoiser's timesteps from the scheduler's.

        Raises:
            ValueError: for a timestep that is none of the run's.
        """
        self._read(scheduler)
        position = self._position(scheduler, timestep, units)
        if self._begin is None:
            self._begin = position - position % self._order
            if self._changed and self._begin > 0:
                raise ValueError(
                    "the timesteps of the scheduler were replaced within a run, so that a guidance that depends on the "
                    "step cannot tell how far the run is; give it no start, stop, schedule, reuse or adaptive_scale"
                )
        end = self._begin + self._calls(self._begin)
        if not self._begin <= position < end:
            raise self._unknown(self._timesteps[position])
        self._last = position
        call, calls = position - self._begin, end - self._begin
        number, steps = call // self._order, -(-calls // self._order)
        return Step(number, number / steps, self._timesteps[position], call, calls)

    def _read(self, scheduler: Any) -> None:
        """Read the timesteps, if they are others than before."""
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
        """How many of the timesteps the run takes that begins with one."""
        return sum(self._cutoff is None or timestep >= self._cutoff for timestep in self._timesteps[begin:])

    def _position(self, scheduler: Any, timestep: Any, units: Units) -> int:
        stored = _position_in(self._tensor, timestep)
        if stored is not None and stored < len(self._timesteps):
            return stored
        value, precision = timestep_value(timestep)
        # Loops of the user's own may have the denoiser's timesteps.
        errors = [min(abs(units(t) - value), abs(t - value)) for t in self._timesteps]
        rounding = max(4.0 * _FLOAT32 * max(1.0, abs(value)), precision * abs(value))
        if not min(errors, default=math.inf) <= rounding:
            raise self._unknown(value)
        limit = rounding if precision > _FLOAT32 else min(errors)
        candidates = [position for position, error in enumerate(errors) if error <= limit]
        if len(candidates) == 1:
            return candidates[0]
        # Heun's method has equal timesteps, and others are equal in bfloat16; the scheduler says at which it is.
        for name in ("step_index", "begin_index"):
            index = getattr(scheduler, name, None)
            if index is not None and int(index) in candidates:
                return int(index)
        return next((position for position in candidates if position >= self._last), candidates[0])

    def _unknown(self, value: float) -> ValueError:
        shown = ", ".join(f"{t:g}" for t in self._timesteps[:4])
        return ValueError(
            f"the denoiser was called at timestep {value:g}, which is none of the {len(self._timesteps)} of this run "
            f"({shown}, ...), so that a guidance that depends on the step cannot tell its strength; give it no start, "
            f"stop, schedule, reuse or adaptive_scale"
        )


def steps_of(run: PipelineRun, scheduler: Any) -> RunSteps:
    """The steps of a run, which all its guidances share."""
    steps = run.state.get(RunSteps)
    if steps is None:
        steps = run.state[RunSteps] = RunSteps(run, scheduler)
    return steps


def cutoff_of(run: PipelineRun, scheduler: Any) -> float | None:
    """The least timestep of a run with ``denoising_end``; None without one.

    Source: diffusers' Stable Diffusion XL pipelines.
    """
    end = run.setting("denoising_end")
    if not (isinstance(end, float) and 0.0 < end < 1.0):
        return None
    train_timesteps = scheduler.config.num_train_timesteps
    return float(round(train_timesteps - end * train_timesteps))


def timestep_value(timestep: Any) -> tuple[float, float]:
    """A timestep as the denoiser gets it, and the relative precision of its dtype.

    Args:
        timestep: a number, a tensor with one for each sample, or one for each token of each sample, in which tokens of
            a given picture are at 0. Waits for its device.

    Raises:
        ValueError: for samples at different timesteps.
    """
    if not isinstance(timestep, torch.Tensor):
        return float(timestep), _FLOAT32
    check_one_timestep(timestep)
    precision = max(_FLOAT32, torch.finfo(timestep.dtype).eps) if timestep.is_floating_point() else _FLOAT32
    return float(_of_samples(timestep)[0]), precision


def check_one_timestep(timestep: Any) -> None:
    """Raise a ValueError for samples at different timesteps. Waits for the device of several numbers."""
    if not isinstance(timestep, torch.Tensor) or timestep.is_meta or _is_one_number(timestep):
        return
    values = _of_samples(timestep)
    if not bool((values == values[0]).all()):
        raise ValueError(
            f"the samples of the denoiser's batch are at different timesteps, {values.tolist()}: guide needs a batch "
            f"of one timestep"
        )


def _of_samples(timestep: torch.Tensor) -> torch.Tensor:
    """The timestep of each sample."""
    return timestep.detach().flatten(1).amax(1) if timestep.ndim > 1 else timestep.detach().reshape(-1)


def same_timestep(first: Any, second: Any) -> bool:
    """True if two calls of the denoiser are at one timestep. Waits for the device of different tensors."""
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
    """True if all its elements are one in memory."""
    return all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))


def _position_in(timesteps: Any, timestep: Any) -> int | None:
    """The position of a timestep that is a view of an element of the scheduler's; None where it is none."""
    if not (isinstance(timesteps, torch.Tensor) and isinstance(timestep, torch.Tensor)):
        return None
    if timesteps.is_meta or timestep.is_meta or timesteps.dtype != timestep.dtype or timesteps.ndim != 1:
        return None
    if not _is_one_number(timestep) or timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    position, rest = divmod(int(timestep.storage_offset() - timesteps.storage_offset()), max(1, timesteps.stride(0)))
    return position if not rest and 0 <= position < len(timesteps) else None
