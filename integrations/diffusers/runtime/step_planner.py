# SPDX-License-Identifier: Apache-2.0
"""Planner of a guided denoiser's calls: the active guidance, the places where branches join, and the arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from segkern.integrations.diffusers.runtime.branches import Arguments, Forward
from segkern.integrations.diffusers.runtime.denoiser_guidance import DenoiserGuidance
from segkern.integrations.diffusers.runtime.denoisers import Denoiser
from segkern.integrations.diffusers.runtime.layout import BatchLayout, CallKind, CallLayout
from segkern.integrations.diffusers.runtime.negative_prompt import negative_text
from segkern.integrations.diffusers.runtime.pipeline_run import PipelineRun
from segkern.integrations.diffusers.runtime.reuse import Differences
from segkern.integrations.diffusers.runtime.steps import Step, steps_of
from segkern.integrations.specs import CFG, PAG, SAG
from segkern.integrations.specs.base import Spec

# The shift that the call for the negative prompt adds, with the guidance scale if only that prediction may change.
PendingShift = tuple[torch.Tensor | None, float | None]


@dataclass
class RunState:
    """The state of one denoiser's guidance in one run.

    Attributes:
        layout: Layout of the denoiser's calls.
        differences: Differences that later calls reuse.
        pending: The shifts that calls for the negative prompt add, by the number of the call for the prompt.
        call: Number of the last timestep in which guidance with ``reuse`` was active.
    """

    layout: BatchLayout
    differences: Differences
    pending: dict[int, PendingShift] = field(default_factory=dict)
    call: int | None = None

    def drop_pending(self, name: str, *, all_of_them: bool = False) -> None:
        """Discard shifts whose call for the negative prompt did not come.

        Args:
            name: Name of the pipeline, for the message.
            all_of_them: Discard all; used at the end of a run.

        Raises:
            RuntimeError: If a discarded shift could only have been added in that call.
        """
        for pair in [pair for pair in self.pending if all_of_them or not self.layout.awaits(pair)]:
            shift, rescaled = self.pending.pop(pair)
            if shift is not None and rescaled is not None:
                raise RuntimeError(
                    f"{name} rescales to its conditional prediction, so guidance acts only in the call for the "
                    f"negative prompt, but one step had no such call; run such steps without true_cfg_scale and "
                    "guidance_rescale"
                )


class StepPlanner:
    """Plans the calls of one denoiser.

    Args:
        pipe: The guided pipeline.
        denoiser: The denoiser.
        specs: The guidance specs.
        guidance: The guidance inside the denoiser.
        share: Whether branches may join inside the denoiser.

    Attributes:
        negative: Negative text of each ``CFG`` spec, by index.

    Raises:
        ValueError: If a negative prompt cannot be encoded.
    """

    def __init__(
        self, pipe: Any, denoiser: Denoiser, specs: Sequence[Spec], guidance: DenoiserGuidance, share: bool
    ) -> None:
        self._pipe = pipe
        self._denoiser = denoiser
        self._specs = specs
        self._first = guidance.first
        self._changed = guidance.changed
        self._share = share
        self._depends_on_step = any(spec.depends_on_step for spec in specs)
        self._reuses = any(spec.reuse > 1 for spec in specs)
        self.negative = {i: negative_text(pipe, spec) for i, spec in enumerate(specs) if isinstance(spec, CFG)}

    def forward(
        self, run: PipelineRun, state: RunState, layout: CallLayout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Forward | None:
        """Return the plan of the next call; None if it is not guided.

        Raises:
            ValueError: If guidance depends on the step and the run does not have the timestep, or if a spec conflicts
                with the pipeline's own guidance.
        """
        strengths, step = self._strengths(run, state, args, kwargs)
        if not strengths:
            return None
        sample = self._denoiser.sample(args, kwargs)
        computed = [index for index in strengths if state.differences.due(index, step, sample.shape)]
        branches = [index for index in computed if not isinstance(self._specs[index], SAG)]
        sag = tuple(index for index in computed if isinstance(self._specs[index], SAG))
        reused = tuple(index for index in strengths if index not in computed)
        batch = replace(layout.batch, branches=len(branches))
        follows = layout.kind is CallKind.PROMPT and state.layout.expects_negative() is not False
        follows = follows and not self._is_truncated(run, args, kwargs)
        guided_by_text = batch.first > 0 or (follows and bool(state.layout.expects_negative()))
        if guided_by_text and any(index in self.negative for index in strengths):
            self.check_negative_call()
        if sag and layout.kind is CallKind.PROMPT and state.layout.expects_negative():
            raise ValueError(
                "SAG needs the prompt and the negative prompt in one batch, but this pipeline uses separate calls"
            )
        ordered = tuple(sorted(branches, key=lambda index: self._first[index]))
        negative = [batch.branch(i) for i, index in enumerate(ordered) if index in self.negative]
        reference = negative[0] if negative else batch.reference
        forward = Forward(
            batch,
            ordered,
            self._first,
            True,
            strengths,
            reused,
            sag,
            reference,
            pair=layout.pair if follows else None,
            rescaled=self._denoiser.rescaled_guidance_scale(run) if guided_by_text else None,
            frames=self._denoiser.frames(sample),
            changed=tuple((index, place) for index in ordered for place in self._changed(index, step)),
            step=step,
        )
        shares = self._share and self._denoiser.can_share(forward, args, kwargs)
        return replace(forward, share=shares)

    def _is_truncated(self, run: PipelineRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True if the pipeline does not call the denoiser for the negative prompt in this step (Lumina 2)."""
        ratio = run.setting("cfg_trunc_ratio")
        if ratio is None or float(ratio) >= 1.0:
            return False
        step = self.step(run, args, kwargs)
        return (step.call + 1) / step.calls > float(ratio)

    def check_negative_call(self) -> None:
        """Raise a ValueError if ``CFG(...)`` is used with the pipeline's own classifier-free guidance."""
        if self.negative:
            raise ValueError(
                f"this {type(self._pipe).__name__} already applies classifier-free guidance; call it with "
                f"guidance_scale=1, or remove CFG(...)"
            )

    def check_unexpected_negative_call(self, run: PipelineRun, state: RunState) -> None:
        """Check an unexpected call for the negative prompt.

        Raises:
            ValueError: If the pipeline rescales to its conditional prediction, which already includes the shift.
        """
        if state.layout.expects_negative() is not None or run.is_loop:
            return
        if self._denoiser.rescaled_guidance_scale(run) is not None:
            raise ValueError(
                f"this {type(self._pipe).__name__} rescales to its conditional prediction but does not indicate that "
                f"it applies classifier-free guidance, which guide must know beforehand; run it without rescaling"
            )

    def reference_inputs(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Return the arguments of the samples to degrade, copied before the denoiser modifies them."""
        batch = forward.batch
        if forward.reference == batch.reference:
            return self._denoiser.arguments.take(args, kwargs, batch, batch.reference)
        args, kwargs = self._denoiser.arguments.take(args, kwargs, batch, batch.conditional)
        (text,) = self.negative.values()
        return text.put(self._denoiser.arguments, args, kwargs, slice(0, batch.samples))

    def step(self, run: PipelineRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        """Return the step of the next call."""
        scheduler = getattr(self._pipe, "scheduler", None)
        return steps_of(run, scheduler).of_call(scheduler, self._denoiser.timestep(args, kwargs), self._denoiser.units)

    def _strengths(
        self, run: PipelineRun, state: RunState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[int, float], int]:
        """Return the strengths of the guidance that is active in the next call, and the number of its step."""
        fraction, timestep, number = 0.0, None, 0
        if self._depends_on_step:
            step = self.step(run, args, kwargs)
            fraction, timestep, number = step.fraction, step.timestep, step.number
            if self._reuses:
                self._check_reuse(state, step)
        adaptive = any(isinstance(spec, PAG) and spec.adaptive_scale for spec in self._specs)
        strengths = {
            index: spec.strength(fraction, timestep if adaptive else None) for index, spec in enumerate(self._specs)
        }
        return {index: strength for index, strength in strengths.items() if strength != 0.0}, number

    def _check_reuse(self, state: RunState, step: Step) -> None:
        """Raise a ValueError for a second call at a timestep, because it is unclear which difference it would reuse."""
        if state.call == step.call and step.calls > 1:
            raise ValueError(
                f"the denoiser of this {type(self._pipe).__name__} is called several times at one timestep (for "
                f"example, for tiles or views), and each call needs its own difference; use reuse=1"
            )
        state.call = step.call

    def grown(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Return the denoiser's arguments with the branches that join before its first block; None for no change."""
        grown = self._denoiser.grown(forward, args, kwargs)
        if grown is None or forward.joined(-1) == 0:
            return grown
        args, kwargs = grown
        for branch, index in enumerate(forward.branches):
            if index in self.negative:
                text, samples = self.negative[index], forward.batch.branch(branch)
                args, kwargs = text.put(self._denoiser.arguments, args, kwargs, samples)
        return args, kwargs
