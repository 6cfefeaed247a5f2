# SPDX-License-Identifier: Apache-2.0
"""Plan each forward of a guided denoiser: guidances that act in it, places where they join, and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from segkern.integrations.diffusers.runtime.branches import Arguments, Forward
from segkern.integrations.diffusers.runtime.denoisers import Denoiser
from segkern.integrations.diffusers.runtime.layout import BatchLayout, CallKind, CallLayout
from segkern.integrations.diffusers.runtime.negative_prompt import negative_text
from segkern.integrations.diffusers.runtime.pipeline_run import PipelineRun
from segkern.integrations.diffusers.runtime.reuse import Differences
from segkern.integrations.diffusers.runtime.steps import Step, steps_of
from segkern.integrations.specs import CFG, PAG, SAG
from segkern.integrations.specs.base import Spec

# What the call for a negative prompt adds, with the guidance scale where it alone may change.
PendingShift = tuple[torch.Tensor | None, float | None]


@dataclass
class RunState:
    """The state of one denoiser's guidance in one run.

    Attributes:
        layout: of its calls.
        differences: that later forwards take from earlier ones.
        pending: by the number of a call for the prompt, the shift that the one for the negative prompt adds.
        call: number of the last timestep in which a guidance with ``reuse`` acted.
    """

    layout: BatchLayout
    differences: Differences
    pending: dict[int, PendingShift] = field(default_factory=dict)
    call: int | None = None

    def drop_pending(self, name: str, *, all_of_them: bool = False) -> None:
        """Forget shifts whose call for the negative prompt did not come.

        Args:
            name: of the pipeline, for the message.
            all_of_them: at the end of a run.

        Raises:
            RuntimeError: for one that only that call would have added.
        """
        for pair in [pair for pair in self.pending if all_of_them or not self.layout.awaits(pair)]:
            shift, rescaled = self.pending.pop(pair)
            if shift is not None and rescaled is not None:
                raise RuntimeError(
                    f"{name} measures its conditional prediction, so that guidance acts in the call for the negative "
                    f"prompt, which did not come in one of its steps; run those steps without true_cfg_scale and "
                    f"guidance_rescale"
                )


class StepPlanner:
    """Plans the forwards of one denoiser.

    Args:
        pipe: that is guided.
        denoiser: the denoiser.
        specs: the guidances.
        first: for each of them the place at which its branch joins.
        share: whether branches may join inside.

    Attributes:
        negative: the text that a guidance leads away from, of those that have one.

    Raises:
        ValueError: for a negative prompt that cannot be had.
    """

    def __init__(self, pipe: Any, denoiser: Denoiser, specs: Sequence[Spec], first: Sequence[int], share: bool) -> None:
        self._pipe = pipe
        self._denoiser = denoiser
        self._specs = specs
        self._first = first
        self._share = share
        self._depends_on_step = any(spec.depends_on_step for spec in specs)
        self._reuses = any(spec.reuse > 1 for spec in specs)
        self.negative = {i: negative_text(pipe, spec) for i, spec in enumerate(specs) if isinstance(spec, CFG)}

    def forward(
        self, run: PipelineRun, state: RunState, layout: CallLayout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Forward | None:
        """The plan of the coming forward; None when it is a plain one.

        Raises:
            ValueError: for a timestep that is none of the run's, where a guidance depends on the step, and for a
                guidance that does not fit the pipeline's own.
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
        guided_by_text = batch.first > 0 or (follows and bool(state.layout.expects_negative()))
        if guided_by_text and any(index in self.negative for index in strengths):
            self.check_negative_call()
        if sag and layout.kind is CallKind.PROMPT and state.layout.expects_negative():
            raise ValueError(
                "SAG needs the prompt and the negative prompt in one batch, and they have calls of their own"
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
        )
        shares = self._share and self._denoiser.can_share(forward, args, kwargs)
        return replace(forward, share=shares)

    def check_negative_call(self) -> None:
        """Raise a ValueError for ``CFG(...)`` beside the pipeline's own classifier-free guidance."""
        if self.negative:
            raise ValueError(
                f"this {type(self._pipe).__name__} runs classifier-free guidance itself; call it with "
                f"guidance_scale=1, or leave CFG(...) out"
            )

    def check_unexpected_negative_call(self, run: PipelineRun, state: RunState) -> None:
        """Check a call for the negative prompt of a pipeline that did not say that one follows.

        Raises:
            ValueError: where the pipeline measures its conditional prediction, to which the shift was added already.
        """
        if state.layout.expects_negative() is not None or run.is_loop:
            return
        if self._denoiser.rescaled_guidance_scale(run) is not None:
            raise ValueError(
                f"this {type(self._pipe).__name__} measures its conditional prediction and does not say that it runs "
                f"classifier-free guidance, which guide has to know beforehand; run it without rescaling"
            )

    def reference_inputs(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Arguments of the samples that are degraded, taken before the denoiser takes any of them apart."""
        batch = forward.batch
        if forward.reference == batch.reference:
            return self._denoiser.arguments.take(args, kwargs, batch, batch.reference)
        args, kwargs = self._denoiser.arguments.take(args, kwargs, batch, batch.conditional)
        (text,) = self.negative.values()
        return text.put(self._denoiser.arguments, args, kwargs, slice(0, batch.samples))

    def step(self, run: PipelineRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        """The step of the coming forward."""
        scheduler = getattr(self._pipe, "scheduler", None)
        return steps_of(run, scheduler).of_call(scheduler, self._denoiser.timestep(args, kwargs), self._denoiser.units)

    def _strengths(
        self, run: PipelineRun, state: RunState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[int, float], int]:
        """Strengths of the guidances that act in the coming forward, and the number of its step."""
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
        """Raise a ValueError when a second call comes at a timestep: whose difference it would reuse is not known."""
        if state.call == step.call and step.calls > 1:
            raise ValueError(
                f"the denoiser of this {type(self._pipe).__name__} is called several times at one timestep (tiles or "
                f"views, for example), each of which needs its own difference; take reuse=1"
            )
        state.call = step.call

    def grown(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The denoiser's arguments with the branches that join before its first block; None for no change."""
        grown = self._denoiser.grown(forward, args, kwargs)
        if grown is None or forward.joined(-1) == 0:
            return grown
        args, kwargs = grown
        for branch, index in enumerate(forward.branches):
            if index in self.negative:
                text, samples = self.negative[index], forward.batch.branch(branch)
                args, kwargs = text.put(self._denoiser.arguments, args, kwargs, samples)
        return args, kwargs
