# SPDX-License-Identifier: Apache-2.0
"""``guide``: guidance on a stock pipeline, through hooks that come off again."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.integrations.diffusers.models.architectures import batch_of
from segkern.integrations.diffusers.runtime.branches import Arguments, Forward, difference, fold, shifted, summed
from segkern.integrations.diffusers.runtime.denoiser_guidance import DenoiserGuidance
from segkern.integrations.diffusers.runtime.denoisers import Denoiser
from segkern.integrations.diffusers.runtime.forward_lock import ForwardLock
from segkern.integrations.diffusers.runtime.hooks import Outer
from segkern.integrations.diffusers.runtime.module_checks import ModuleChecks
from segkern.integrations.diffusers.runtime.origins import Trust, check_trust
from segkern.integrations.diffusers.runtime.outputs import check_size, prediction_of, with_prediction
from segkern.integrations.diffusers.runtime.per_sample import check_attention_arguments
from segkern.integrations.diffusers.runtime.processor import norms, unwrap
from segkern.integrations.diffusers.runtime.report import GuidanceWarning, Recorder, Report
from segkern.integrations.diffusers.runtime.run_context import RunContext
from segkern.integrations.diffusers.runtime.sag_forward import SAGForward
from segkern.integrations.diffusers.runtime.step_planner import StepPlanner
from segkern.integrations.diffusers.runtime.support import GUIDED, check_model, check_pipeline, choose_layers
from segkern.integrations.diffusers.specs.base import PlacedSpec, Spec

# What the next call for a negative prompt adds, with the guidance scale where it alone may change.
PendingShift = tuple[torch.Tensor | None, float | None]


def guide(pipe: Any, *specs: Spec, share: bool = True, trust: Trust = ()) -> Guidance:
    """Turn on guidance for every run of a pipeline, until the context is left or ``remove()`` is called.

    The pipeline stays the stock one, whatever its task (text to image, image to image, inpainting,
    ControlNet, T2I-Adapter, IP-Adapter, LoRA): hooks on its denoiser append one branch for each spec (``SAG`` has
    a forward of its own), compute the guided prediction and hand it back in the shape the pipeline expects. The
    pipeline's own arguments mean what they always meant. Specs combine: each adds its scale times its difference,
    ``u + g (c - u) + sum_i s_i (c - p_i)``, and a layer may belong to several. Guidance belongs to the pipeline:
    another one that shares its denoiser runs unguided, in another thread too: forwards of a guided denoiser come one
    after the other. Copies and pickles of the pipeline or its denoiser are unguided.

    Args:
        pipe: a pipeline with a ``UNet2DConditionModel`` (Stable Diffusion 1, 2, XL, Kolors), a ``UNetMotionModel``
            (AnimateDiff) or one of the known transformers (docs/models.md lists them). Its denoiser may be compiled.
        specs: the guidances, at least one.
        share: let a branch join the batch only at the transformer block of its first layer, since it equals the
            conditional branch before; a UNet's layer projects the branch's queries, keys and values once for both.
            The result is the same, up to rounding, and costs less; False is there to check.
        trust: classes of attention processors and blocks, and functions that replaced a module's ``forward``, which are
            not of PyTorch or diffusers: the statement that each treats every sample of a batch by itself, wherever it
            stands, and keeps nothing from one forward to the next. Guidance appends samples to the batch, so any that
            would see them and is not named here is refused.

    Returns:
        The active guidance, a context manager. Leaving it, by an exception too, puts back the very objects
        that were there. It warns if the denoiser ran but a guidance fired never or moved nothing.

    Raises:
        ValueError: for a pipeline, layer or spec that does not fit; the message quotes it and the pipeline is
            left as it was.

    Source: SEG (arXiv 2408.00760); its official implementation for the sum with classifier-free guidance.

    Example:
        >>> from diffusers import StableDiffusionXLPipeline  # doctest: +SKIP
        >>> pipe = StableDiffusionXLPipeline.from_pretrained("path/to/checkpoint")  # doctest: +SKIP
        >>> with guide(pipe, SEG(scale=3.0, sigma=math.inf, layers="mid")) as guidance:  # doctest: +SKIP
        ...     image = pipe("a red fox", guidance_scale=5.0).images[0]
        >>> print(guidance.report())  # doctest: +SKIP
    """
    trust = check_trust(trust)
    placed = [(denoiser, choose_layers(denoiser, specs)) for denoiser in check_pipeline(pipe)]
    guidance = Guidance(pipe, *placed[0], share, trust)
    guidance._others = [Guidance(pipe, *denoiser_specs, share, trust, guidance) for denoiser_specs in placed[1:]]
    for each in (guidance, *guidance._others):
        each._checks.check()
    guidance._install()
    return guidance


class Guidance:
    """Guidance at work on a pipeline; made by :func:`guide`."""

    def __init__(
        self,
        pipe: Any,
        denoiser: Denoiser,
        placed: tuple[PlacedSpec, ...],
        share: bool,
        trust: Trust = (),
        beside: Guidance | None = None,
    ) -> None:
        self._pipe = pipe
        self._others: list[Guidance] = []  # of denoisers that take turns with this one in a run
        self._denoiser = denoiser
        # torch.compile's wrapper, if there is one: bookkeeping stays outside
        self._module: nn.Module = getattr(pipe, denoiser.name)
        self._specs = tuple(placed_spec.spec for placed_spec in placed)
        self._run: RunContext = RunContext(pipe) if beside is None else beside._run
        self._for_others = 0  # forwards that other pipelines asked for
        self._denoiser_guidance = DenoiserGuidance(denoiser, placed, may_skip=bool(trust))
        self._checks = ModuleChecks(denoiser, self._denoiser_guidance.first, share, trust)
        self._recorder: Recorder = self._denoiser_guidance.recorder if beside is None else beside._recorder
        self._denoiser_guidance.recorder = self._recorder
        self._arguments = denoiser.arguments
        self._installed = False
        self._entered = 0  # contexts that are open
        self._first_of_run: Guidance = self if beside is None else beside  # which removes them all
        self._leaving = False  # as soon as the forward under way is over
        self._lock = ForwardLock(self._module)
        self._handles: list[RemovableHandle] = []  # on the denoiser, for as long as it is guided
        self._layers = self._denoiser_guidance.layers
        self._planner = StepPlanner(pipe, denoiser, self._specs, self._denoiser_guidance.first, share, self._run)
        self._sag = SAGForward(pipe, denoiser.model, self._specs)
        self._forward: Forward | None = None  # the one under way; None when it is a plain one
        self._given: Arguments = ((), {})  # its arguments, where another forward follows
        self._part = "other"  # what the last call was for
        self._size: int | None = None  # of the batch in the forward under way; None for another pipeline's
        self._pending: PendingShift | None = None
        self._differences = self._planner.differences

    def __deepcopy__(self, memo: dict[int, Any]) -> Guidance:
        """A copy of something that holds a pipeline and its guidance; the copied pipeline is not guided."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Guidance acts on a pipeline of this process and cannot be pickled; pickle the pipeline, which arrives "
            "unguided, or report()"
        )

    def __enter__(self) -> Guidance:
        if not self._handles or self._leaving:
            raise RuntimeError("this guidance has been removed; call guide again")
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered <= 0:  # the outermost one
            self._remove(warn=kind is None)

    def remove(self) -> None:
        """Take the guidance off the pipeline; nothing happens when it is off already.

        Where a step is under way in which guidance acts already, it comes off when the denoiser is through with it.
        """
        self._remove(warn=True)

    def report(self) -> Report:
        """Report the guidance so far; warns if it fired never or moved nothing."""
        self._clear_interrupted()
        report = self._recorder.report()
        self._recorder.warn(report, stacklevel=3)
        return report

    def _install(self) -> None:
        try:
            self._installed = True
            GUIDED.add(self._denoiser.model)
            self._denoiser_guidance.attach()  # says now what would not do
            self._denoiser_guidance.detach()
            self._lock = ForwardLock(self._module)  # who is in it as the hooks come
            self._denoiser_guidance.recomputation.lock = self._lock
            self._denoiser_guidance.recomputation.compiled = self._module is not self._denoiser.model
            self._handles.append(self._module.register_forward_pre_hook(Outer(self._before), with_kwargs=True))
            # Other forward hooks get the prediction the pipeline gets, so this one comes first.
            after = Outer(self._after)
            self._handles.append(self._module.register_forward_hook(after, prepend=True, always_call=True))
            for other in self._others:
                other._install()
        except BaseException:
            self._remove(warn=False)
            raise

    def _remove(self, warn: bool) -> None:
        if not self._installed:
            return
        self._leaving = True
        if any(guidance._lock.inside() for guidance in (self, *self._others)):
            return
        with ExitStack() as turns:
            for guidance in (self, *self._others):
                guidance._lock.acquire()
                turns.callback(guidance._lock.release)
            if (
                self._installed and not self._awaits_second_call()
            ):  # another thread's forward may have taken it off, or owe the rest
                self._take_off(warn)

    def _awaits_second_call(self) -> bool:
        """True if a run that is under way has made one of two calls that belong together."""
        return any(guidance._pending is not None for guidance in (self, *self._others)) and self._run.is_under_way()

    def _take_off(self, warn: bool) -> None:
        self._installed = False
        for other in self._others:
            if other._installed:
                other._take_off(warn=False)
        GUIDED.discard(self._denoiser.model)
        had_hooks = bool(self._handles)
        ran = had_hooks and self._recorder.forwards > 0
        while self._handles:
            self._handles.pop().remove()
        self._clear()
        self._differences.forget()
        saved = getattr(
            self._denoiser.model, "original_attn_processors", None
        )  # what unfuse_qkv_projections will put back
        if isinstance(saved, dict):
            saved.update({name: unwrap(processor) for name, processor in saved.items()})
        component, pipe = self._denoiser.name, type(self._pipe).__name__
        if warn and had_hooks and self._recorder.forwards == 0 and self._for_others:
            message = (
                f"the {component} of this {pipe} ran for other pipelines only; give guide the pipeline that runs it"
            )
            warnings.warn(f"guidance did nothing: {message}", GuidanceWarning, stacklevel=4)
        elif warn and not ran and had_hooks and getattr(self._pipe, component) is not self._module:
            message = f"this {pipe} was given another {component} while guided; call guide after replacing it"
            warnings.warn(f"guidance did nothing: {message}", GuidanceWarning, stacklevel=4)
        if ran and warn:
            self._recorder.warn(self._recorder.report(), stacklevel=5)

    def _clear(self) -> None:
        """Between forwards the denoiser has its own processors, to be looked at or changed, and nothing is kept."""
        self._forward, self._given, self._pending = None, ((), {}), None
        self._layers.forget()
        self._denoiser_guidance.detach()

    def _clear_interrupted(self) -> None:
        """The same after a forward that an interrupt has ended, which hooks are not told."""
        for guidance in (self, *self._others):
            if guidance._lock.interrupted():
                guidance._lock.acquire()
                guidance._clear()
                guidance._lock.release()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Before the denoiser: decide what this forward does and tell the blocks and layers."""
        if module is not self._module or self._sag.running:  # a copy is not guided
            return None
        self._lock.acquire()
        if not self._installed:  # taken off while this thread waited
            self._lock.release()
            return None
        self._forward = None
        caller = self._run.caller()
        self._part = "foreign" if caller is None else self._denoiser.part(caller, args, kwargs)
        if caller is not None:
            check_attention_arguments(self._arguments, args, kwargs, self._denoiser.model)
        given = None if caller is None else self._arguments.get(self._denoiser.sample_name, args, kwargs)
        self._size = None if given is None else len(given)
        if self._first_of_run._leaving and self._part not in ("foreign", "unconditional"):
            self._first_of_run._take_off(warn=True)  # the forward that it waited for did not come to its end
            self._lock.release()  # no hook will
            return None
        if caller is None or self._part in ("other", "unconditional"):
            self._denoiser_guidance.detach()
            self._for_others += caller is None
            self._recorder.forwards += self._part == "unconditional"
            return None
        self._pending = None
        forward = self._planner.forward(caller, args, kwargs)
        self._checks.before(self._run.count, forward, self._size or 1)
        plain = forward is None or not (forward.branches or forward.sag)
        if plain:
            self._denoiser_guidance.detach()
        else:
            self._denoiser_guidance.attach()
        self._recorder.forwards += 1
        self._forward = forward
        if forward is None or plain:
            return None
        if forward.sag:
            self._given = self._planner.reference_inputs(forward, args, kwargs)
        check_model(self._denoiser.model)
        self._denoiser_guidance.tell(forward, args, kwargs)
        return self._planner.grown(forward, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the denoiser: fold the branches back and take down what the layers report."""
        if module is not self._module or self._sag.running:
            return None
        try:
            changed = self._end(output)
            if self._first_of_run._leaving and output is not None and self._pending is None:
                self._first_of_run._take_off(warn=True)
            return changed
        finally:
            self._lock.release()

    def _end(self, output: Any) -> Any:
        """The denoiser's output with the guidance in it; None for the one it gave."""
        if output is None:  # an exception; what another pipeline meets is nothing to the guided one
            if self._part != "foreign":
                self._clear()
                self._differences.forget()
            return None
        forward, owed = self._forward, self._pending if self._part == "unconditional" else None
        if forward is None and self._size is not None:
            check_size(output, self._size, type(self._denoiser.model).__name__)
        if forward is None and owed is None:
            return None
        try:
            prediction = prediction_of(output)
            sample = batch_of(prediction)
            if forward is not None:
                owes, folded = self._folded(forward, sample)
            else:
                shift, rescaled = owed or (None, None)
                owes, folded = None, sample if shift is None else shifted(sample, shift, rescaled)
        except BaseException:
            self._clear()
            raise
        self._clear()
        self._pending = owes
        result = list(folded.unbind()) if isinstance(prediction, list) else folded
        return with_prediction(output, result, None if forward is None else forward.batch)

    def _folded(self, forward: Forward, sample: torch.Tensor) -> tuple[PendingShift | None, torch.Tensor]:
        """The shift that the next call adds, and the guided prediction of the pipeline's own batch."""
        batch, moved = forward.batch, self._denoiser_guidance.reports(forward)
        expected = batch.with_branches(len(forward.branches))
        if sample.shape[0] != expected:
            raise RuntimeError(f"the guided denoiser gave {sample.shape[0]} predictions for a batch of {expected}")
        if forward.sag:  # the second forward of a denoiser in a CUDA graph writes where the first one did
            sample, moved = sample.clone(), {key: pair.clone() for key, pair in moved.items()}
        guided = [(forward.strengths[index], self._differences.last(index)) for index in forward.reused]
        for branch, index in enumerate(forward.branches):
            delta = difference(sample, batch, branch)
            self._differences.keep(index, delta)
            guided.append((forward.strengths[index], delta))
            if index in self._planner.negative:
                moved[index, ""] = torch.stack([norms(delta), norms(sample[batch.conditional])])
        for index in forward.sag:
            layer = next(layer for layer in self._layers if index in layer.readers)
            with self._denoiser_guidance.quiet(forward):
                delta, moved[index, layer.info.module] = self._sag.difference(
                    index, self._module, self._arguments, self._given, sample[forward.reference], layer
                )
            self._differences.keep(index, delta)
            guided.append((forward.strengths[index], delta))
        self._recorder.add(moved, sample.dtype)
        shift = summed(guided)
        if not forward.cfg or batch.first:
            return None, fold(sample, batch, shift, forward.rescaled)
        own = fold(sample, batch, shift if forward.rescaled is None else None, None)
        return (shift, forward.rescaled), own  # a call for the negative prompt follows
