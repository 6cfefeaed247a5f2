# SPDX-License-Identifier: Apache-2.0
"""Guidance in a guider's denoiser calls, through hooks that are registered for one call and then removed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.integrations.diffusers.models.architectures import batch_of
from segkern.integrations.diffusers.models.layers import find_model
from segkern.integrations.diffusers.runtime.branches import Arguments, Batch, Forward
from segkern.integrations.diffusers.runtime.checkpoints import CheckpointCheck
from segkern.integrations.diffusers.runtime.denoiser_guidance import DenoiserGuidance
from segkern.integrations.diffusers.runtime.denoiser_lock import denoiser_lock
from segkern.integrations.diffusers.runtime.denoisers import Denoiser, find_denoisers
from segkern.integrations.diffusers.runtime.guidance import is_guided
from segkern.integrations.diffusers.runtime.hooks import Outer
from segkern.integrations.diffusers.runtime.module_checks import ModuleChecks
from segkern.integrations.diffusers.runtime.origins import Trust, check_trust
from segkern.integrations.diffusers.runtime.per_sample import check_attention_arguments
from segkern.integrations.diffusers.runtime.pipeline_run import in_repeated_forward
from segkern.integrations.diffusers.runtime.report import Recorder
from segkern.integrations.diffusers.runtime.reuse import Differences
from segkern.integrations.diffusers.runtime.sag_forward import SAGForward
from segkern.integrations.diffusers.runtime.steps import timestep_value
from segkern.integrations.diffusers.runtime.support import choose_layers
from segkern.integrations.specs import SAG
from segkern.integrations.specs.base import Spec


@dataclass
class Step:
    """One step of a run, as seen by a guider.

    Attributes:
        number: Number of the step, from 0.
        strength: Guidance scale in this step; 0 if guidance is inactive.
        timestep: Timestep of the scheduler.
    """

    number: int = 0
    strength: float = 0.0
    timestep: Any = None


class GuiderCalls:
    """One guidance spec in the calls of one denoiser.

    For all methods except SAG, a branch joins the call for the prompt, as under ``guide``. Its output is returned as
    additional samples, so whatever a pipeline does to the output also applies to the branch. For SAG, a second call is
    made inside the first.

    Args:
        denoiser: The denoiser as the pipeline calls it, compiled or not.
        spec: The guidance spec.
        trust: Classes and functions that the user declares to process each sample of a batch independently.

    Attributes:
        recorder: Records the effects of guidance.
        samples: Number of samples that the pipeline passed in the call that a branch has just joined; None without a
            branch.
        kept: The difference from a second call or from an earlier step; None if the branch is in the output.

    Raises:
        ValueError: If the denoiser or a layer is not supported, or if the denoiser is under ``guide``.
    """

    def __init__(self, denoiser: nn.Module, spec: Spec, trust: Trust = ()) -> None:
        self._module = denoiser
        self._spec = spec
        self._trust = trust
        denoisers = find_denoisers(SimpleNamespace(unet=denoiser))
        if not denoisers:
            find_model(denoiser)  # raises an error that lists the supported models
        self._denoiser: Denoiser = denoisers[0]
        self._denoiser_guidance = DenoiserGuidance(
            self._denoiser, choose_layers(self._denoiser, (spec,)), check_trust(trust)
        )
        self._denoiser_guidance.recomputation.lock = self._lock = denoiser_lock(self._denoiser.model)
        self._denoiser_guidance.recomputation.compiled = denoiser is not self._denoiser.model
        first, remedy = self._denoiser_guidance.first, "guider.trust = [{}]"
        self._checks = ModuleChecks(self._denoiser, first, True, check_trust(trust), remedy)
        self._runs = 0
        self.recorder: Recorder = self._denoiser_guidance.recorder
        self.samples: int | None = None
        self.kept: torch.Tensor | None = None
        self._differences = Differences((spec,))
        self._handles: list[RemovableHandle] = []
        self._step = Step()
        self._inputs: Mapping[str, Any] = {}  # inputs of the expected call, from the guider
        self._forward: Forward | None = None
        self._given: Arguments = ((), {})
        self._sag: SAGForward | None = None
        self._thread: int | None = None  # thread in which the call is expected
        self._has_lock = False
        self._checkpoints = CheckpointCheck(True)  # created when a call is expected

    def is_of(self, denoiser: nn.Module, trust: Trust) -> bool:
        """Return True if this belongs to the denoiser and trusts the same code."""
        return self._module is denoiser and self._trust == trust

    def new_step(self, first: bool) -> None:
        """Discard the state of the last step; in the ``first`` step of a run, also the state of the last run."""
        self.release()  # after an exception
        self.samples, self.kept = None, None
        if first:
            self._runs += 1
            self._differences.forget()

    def prepare(self, step: Step, scheduler: Any = None, inputs: Mapping[str, Any] | None = None) -> None:
        """Expect the denoiser's next call, and act in it if guidance is active in this step.

        Args:
            step: The step of the call.
            scheduler: The scheduler, for SAG.
            inputs: The inputs of the call, to recognise it.

        Raises:
            ValueError: If the denoiser is under ``guide``, or if the scheduler is not supported.
        """
        self.release()
        self.recorder.forwards += 1
        if is_guided(self._module):
            raise ValueError("this denoiser is under guide(...); remove that guidance, or use another guider")
        if step.strength == 0.0:
            return
        self._step, self._inputs, self._thread = step, inputs or {}, threading.get_ident()
        self._checkpoints = CheckpointCheck(True)
        if isinstance(self._spec, SAG):
            if scheduler is None:
                raise ValueError(
                    "SAGGuider needs the pipeline's scheduler to noise images again; pass SAGGuider(..., "
                    "scheduler=pipe.scheduler)"
                )
            self._sag = SAGForward(SimpleNamespace(scheduler=scheduler), (self._spec,))
        self._handles.append(self._module.register_forward_pre_hook(Outer(self._before), with_kwargs=True))
        self._handles.append(self._module.register_forward_hook(Outer(self._after), prepend=True))
        # After an exception PyTorch iterates over the hooks, so only the last one may remove them.
        self._handles.append(self._module.register_forward_hook(Outer(self._over), always_call=True))

    def release(self) -> None:
        """Restore the denoiser. Does nothing if it has been restored."""
        if not self._handles:
            return
        while self._handles:
            self._handles.pop().remove()
        self._forward, self._given, self._inputs, self._sag = None, ((), {}), {}, None
        if self._has_lock:
            self._denoiser_guidance.detach()
            self._has_lock = False
            self._lock.release()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Before a denoiser call: let the branch join."""
        if not self._is_own(module):
            return None
        if self._forward is not None or not self._is_expected(args, kwargs):
            self.release()  # the expected call never came because of an exception
            return None
        try:
            return self._begin(args, kwargs)
        except BaseException:
            self.release()
            raise

    def _is_expected(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True for the expected call: it has the step's timestep and the guider's inputs."""
        timestep = self._denoiser.timestep(args, kwargs)
        if self._step.timestep is not None and timestep is not None and timestep is not self._step.timestep:
            at, expected = timestep_value(timestep), timestep_value(self._step.timestep)[0]
            least = min(abs(at[0] - value) for value in (expected, self._denoiser.units(expected)))
            if least > 4.0 * at[1] * max(1.0, abs(at[0])):
                return False
        text, known = self._denoiser.prompt(args, kwargs), list(_tensors(self._inputs))
        return text is None or not known or any(_equal(x, text) for x in known)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        sample = self._denoiser.sample(args, kwargs)
        self._checkpoints.check(sample, type(self._denoiser.model).__name__)
        if not self._differences.due(0, self._step.number, sample.shape):
            self.kept = self._differences.last(0)
            return None
        batch = Batch(sample.shape[0], 0, 0 if self._sag else 1)
        own, strengths = batch.conditional, {0: self._step.strength}
        if self._sag:
            self._given = self._denoiser.arguments.take(args, kwargs, batch, own)
            forward = Forward(batch, (), self._denoiser_guidance.first, False, strengths, sag=(0,), reference=own)
        else:
            number, first = self._step.number, self._denoiser_guidance.first
            changed = tuple((0, place) for place in self._denoiser_guidance.changed(0, number))
            forward = Forward(batch, (0,), first, True, strengths, changed=changed, step=number)
            forward = replace(forward, share=self._denoiser.can_share(forward, args, kwargs))
        check_attention_arguments(self._denoiser.arguments, args, kwargs, self._denoiser.model)
        self._lock.acquire()
        self._has_lock = True
        self._checks.before(self._runs, forward, sample.shape[0])
        self._denoiser_guidance.attach(self._checks.watches)
        self._denoiser_guidance.tell(forward, args, kwargs)
        self._forward = forward
        return self._denoiser.grown(forward, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a denoiser call: process its output."""
        if self._is_own(module) and self._forward is not None:
            self._take(self._forward, batch_of(output[0]))

    def _over(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a denoiser call and all its hooks, also after an exception."""
        if self._is_own(module):
            self._denoiser_guidance.forget()
            self.release()

    def _is_own(self, module: nn.Module) -> bool:
        """Return False for calls of a copy, in another thread, or within SAG's second call."""
        return module is self._module and threading.get_ident() == self._thread and not in_repeated_forward()

    def _take(self, forward: Forward, sample: torch.Tensor) -> None:
        """Process the output of the current call."""
        moved = self._denoiser_guidance.reports(forward)
        if self._sag is None:
            self.samples = forward.batch.samples
        else:
            layer = next(iter(self._denoiser_guidance.layers))
            moved = {key: pair.clone() for key, pair in moved.items()}
            with self._denoiser_guidance.quiet(forward):
                self.kept, moved[0, layer.info.module] = self._sag.difference(
                    0, self._module, self._denoiser.arguments, self._given, sample.clone(), layer
                )
            self._differences.keep(0, self.kept)
        self.recorder.add(moved, sample.dtype)

    def difference(self, prediction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the prediction for the prompt without the branch, and the difference that guidance scales, if any.

        Args:
            prediction: The prediction for the prompt, computed by the pipeline from the denoiser's output.

        Raises:
            RuntimeError: If the branch is missing from the prediction.
        """
        samples, difference = self.samples, self.kept
        self.samples, self.kept = None, None
        if samples is None:
            return prediction, difference
        if prediction.shape[0] != 2 * samples:
            raise RuntimeError(
                f"the denoiser returned {samples} predictions and as many perturbed ones, but the guider received "
                f"{prediction.shape[0]}: the pipeline must pass the whole output to the guider"
            )
        own, perturbed = prediction.chunk(2)
        compute = torch.promote_types(prediction.dtype, torch.float32)
        difference = own.to(compute) - perturbed.to(compute)
        self._differences.keep(0, difference)
        return own, difference


def _tensors(value: Any) -> Iterator[Any]:
    """Yield the tensors of a guider's batch, and lists of tensors with one for each sample."""
    for item in value.values() if isinstance(value, Mapping) else ():
        if isinstance(item, torch.Tensor) or (isinstance(item, list) and item and isinstance(item[0], torch.Tensor)):
            yield item


def _equal(x: Any, text: Any) -> bool:
    """Return True if a guider's input equals the prompt of a call in any dtype. May synchronise with the device."""
    if x is text:
        return True
    if isinstance(x, list) or isinstance(text, list):
        alike = isinstance(x, list) and isinstance(text, list) and len(x) == len(text)
        return alike and all(_equal(a, b) for a, b in zip(x, text, strict=True))
    return bool(x.shape == text.shape and torch.equal(x.to(text.device, text.dtype), text))
