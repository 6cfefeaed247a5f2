# SPDX-License-Identifier: Apache-2.0
"""The state of a pipeline's run: the step under way, and whether classifier-free guidance runs in it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from segkern.integrations.diffusers.runtime.branches import Batch
from segkern.integrations.diffusers.runtime.call_stack import Call, frames

_PROPERTY = "do_classifier_free_guidance"
_LOCAL_ANSWERS = ("apply_cfg", "do_true_cfg")  # of pipelines whose property, if there is one, does not know
ANSWERS = (_PROPERTY, *_LOCAL_ANSWERS)


@dataclass(frozen=True)
class Step:
    """The place of one call of the denoiser in its run.

    Attributes:
        call: number of the call in the run, from 0.
        calls: how many the run has.
        number: of the step it belongs to, from 0.
        fraction: the same, of all steps of the run.
    """

    call: int
    calls: int
    number: int
    fraction: float


class RunContext:
    """Follows a pipeline's run from the calls of its denoiser.

    Pipelines say how many calls a run has but not which one is under way, so they are counted. A run begins
    when the scheduler has new timesteps (every run sets them), or when the last one has had all its calls.
    Schedulers of second order (Heun, KDPM2, DPMSolverSDE) call the denoiser twice in each step but the last: their
    ``order``. Both calls make one step together, so they belong to the same step here.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._timesteps: torch.Tensor | None = None  # held, so that a new run's tensor cannot take its identity
        self._call = 0
        self._method: Call | None = None  # of the pipeline, which called the denoiser last
        self.count = 0  # runs that have begun

    def caller(self) -> Mapping[str, Any] | None:
        """Local variables of the pipeline's method that is calling its denoiser; pipelines keep there what they do.

        The nearest pipeline on the call stack is the one. Where there is none (somebody's own denoising loop), the
        call is taken for the guided pipeline's, and nothing is known of it.

        Returns:
            None when another pipeline, which shares the denoiser, is calling it.
        """
        self._method = None
        for frame in frames(sys._getframe(1)):
            names = frame.f_code.co_varnames
            if names and names[0] == "self" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
                if frame.f_locals["self"] is not self._pipe:
                    return None
                self._method = Call(threading.get_ident(), id(frame))
                return frame.f_locals
        return {}

    def is_under_way(self) -> bool:
        """True if the pipeline's method that called the denoiser last has not come to its end."""
        return self._method is not None and self._method.is_under_way()

    def next_step(self) -> Step:
        """Count a call of the denoiser and return its place in the run.

        Raises:
            RuntimeError: when no run of the pipeline is under way.
        """
        timesteps = self._pipe.scheduler.timesteps
        calls = self._ask("num_timesteps") if hasattr(type(self._pipe), "num_timesteps") else len(timesteps)
        if timesteps is not self._timesteps or self._call >= calls:
            self._timesteps = timesteps
            self._call = 0
            self.count += 1
        order = getattr(self._pipe.scheduler, "order", 1)
        number, steps = self._call // order, -(-calls // order)
        self._call += 1
        return Step(self._call - 1, calls, number, number / steps)

    def is_guided_by_text(self, caller: Mapping[str, Any]) -> bool:
        """True if the pipeline runs classifier-free guidance in the step under way.

        Args:
            caller: what :meth:`caller` gave.

        Raises:
            RuntimeError: when no run of the pipeline is under way.
        """
        for name in _LOCAL_ANSWERS:
            if name in caller:
                return bool(caller[name])
        if hasattr(type(self._pipe), _PROPERTY):
            return bool(self._ask(_PROPERTY))
        return bool(caller.get(_PROPERTY, False))

    def batch(self, size: int, branches: int, cfg: bool, conditional_first: bool = False) -> Batch:
        """The layout of a batch of ``size`` samples that so many branches join.

        Args:
            size: of the pipeline's own batch.
            branches: that join it.
            cfg: whether half of it is unconditional.
            conditional_first: whether that half comes last.

        Raises:
            RuntimeError: when the batch cannot be one of it.
        """
        if not cfg:
            return Batch(size, 0, branches)
        if size % 2:
            raise RuntimeError(
                f"the denoiser of a guided pipeline got a batch of {size} under classifier-free guidance, "
                f"where the pipeline passes as many unconditional as conditional samples"
            )
        return Batch(size, size // 2, branches, conditional_first)

    def rescaled_guidance_scale(self, caller: Mapping[str, Any]) -> float | None:
        """The guidance scale of a run with ``guidance_rescale``, else None."""
        rescale = getattr(self._pipe, "guidance_rescale", None)
        if rescale is None:
            rescale = caller.get("guidance_rescale", 0.0)
        return float(self._ask("guidance_scale")) if rescale > 0.0 else None

    def _ask(self, name: str) -> Any:
        try:
            return getattr(self._pipe, name)
        except AttributeError as error:
            raise RuntimeError(
                f"the denoiser of a guided pipeline was called outside a run of it: "
                f"{type(self._pipe).__name__}.{name} is not known before the pipeline's first run"
            ) from error


def number(timestep: Any) -> float:
    """A timestep as the denoiser gets it, a number or a tensor of equal ones, as a number. Waits for its device."""
    return float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
