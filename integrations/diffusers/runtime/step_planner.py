# SPDX-License-Identifier: Apache-2.0
"""Plan each forward of a guided denoiser: guidances that act in it, places where they join, and arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from segkern.integrations.diffusers.runtime.branches import Arguments, Forward
from segkern.integrations.diffusers.runtime.denoisers import Denoiser
from segkern.integrations.diffusers.runtime.negative_prompt import negative_text
from segkern.integrations.diffusers.runtime.reuse import Differences
from segkern.integrations.diffusers.runtime.run_context import RunContext, Step, number
from segkern.integrations.diffusers.specs import CFG, PAG, SAG
from segkern.integrations.diffusers.specs.base import Spec


class StepPlanner:
    """Those of the forwards of one denoiser.

    Args:
        pipe: that is guided.
        denoiser: the denoiser.
        specs: the guidances.
        first: for each of them the place at which its branch joins.
        share: whether branches may join inside.
        run: of the pipeline.

    Attributes:
        negative: the text that a guidance leads away from, of those that have one.
        differences: that later forwards take from earlier ones.

    Raises:
        ValueError: for a negative prompt that cannot be had.
    """

    def __init__(
        self, pipe: Any, denoiser: Denoiser, specs: Sequence[Spec], first: Sequence[int], share: bool, run: RunContext
    ) -> None:
        self._pipe = pipe
        self._denoiser = denoiser
        self._specs = specs
        self._first = first
        self._share = share
        self._run = run
        self._runs = 0  # that this denoiser has had a part in
        self.negative = {i: negative_text(pipe, spec) for i, spec in enumerate(specs) if isinstance(spec, CFG)}
        self.differences = Differences(specs)

    def forward(self, caller: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward | None:
        """The plan of the coming forward; None when it is a plain one."""
        step = self._run.next_step()
        if self._runs != self._run.count:  # a new run, whether a guidance acts at its beginning or not
            self._runs = self._run.count
            self.differences.forget()
        sample = self._denoiser.sample(args, kwargs)
        strengths = self._strengths(step, args, kwargs)
        if not strengths:
            return None
        computed = [index for index in strengths if self.differences.due(index, step.number, sample.shape)]
        branches = [index for index in computed if not isinstance(self._specs[index], SAG)]
        sag = tuple(index for index in computed if isinstance(self._specs[index], SAG))
        reused = tuple(index for index in strengths if index not in computed)
        cfg = self._run.is_guided_by_text(caller)
        batch = self._denoiser.batch(self._run, sample.shape[0], len(branches), cfg)
        if batch.first and any(index in self.negative for index in strengths):
            raise ValueError(
                f"this {type(self._pipe).__name__} runs classifier-free guidance itself; call it with "
                f"guidance_scale=1, or leave CFG(...) out"
            )
        ordered = tuple(sorted(branches, key=lambda index: self._first[index]))
        negative = [batch.branch(i) for i, index in enumerate(ordered) if index in self.negative]
        reference = negative[0] if negative else batch.reference
        rescaled = self._denoiser.rescaled_guidance_scale(self._run, caller) if cfg else None
        step_values = strengths, reused, sag, reference, cfg, rescaled, self._denoiser.frames(sample)
        forward = Forward(batch, ordered, self._first, True, *step_values)
        shares = self._share and self._denoiser.can_share(forward, args, kwargs)
        return replace(forward, share=shares)

    def reference_inputs(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Arguments of the samples that are degraded, taken before the denoiser takes any of them apart."""
        batch = forward.batch
        if forward.reference == batch.reference:
            return self._denoiser.arguments.take(args, kwargs, batch, batch.reference)
        args, kwargs = self._denoiser.arguments.take(args, kwargs, batch, batch.conditional)
        (text,) = self.negative.values()
        return text.put(self._denoiser.arguments, args, kwargs, slice(0, batch.samples))

    def _strengths(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, float]:
        """Of the guidances that act in the coming forward."""
        timestep = None
        if any(isinstance(spec, PAG) and spec.adaptive_scale for spec in self._specs):
            timestep = number(self._denoiser.timestep(self._pipe.scheduler, step.call, args, kwargs))
        strengths = {index: spec.strength(step.fraction, timestep) for index, spec in enumerate(self._specs)}
        return {index: strength for index, strength in strengths.items() if strength != 0.0}

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
