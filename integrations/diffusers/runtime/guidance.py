# SPDX-License-Identifier: Apache-2.0
"""``guide`` and ``Guidance``: guidance on an unmodified diffusers pipeline, through hooks that can be removed."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace, TracebackType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.integrations.diffusers.models.architectures import batch_of
from segkern.integrations.diffusers.runtime.branches import Arguments, Forward, difference, fold, shifted, summed
from segkern.integrations.diffusers.runtime.cache_contexts import forget_contexts, note_contexts
from segkern.integrations.diffusers.runtime.denoiser_guidance import DenoiserGuidance
from segkern.integrations.diffusers.runtime.denoiser_lock import denoiser_lock
from segkern.integrations.diffusers.runtime.denoisers import Denoiser
from segkern.integrations.diffusers.runtime.hooks import Outer
from segkern.integrations.diffusers.runtime.layout import BatchLayout, CallKind, CFGLayout, ConditionalPlace
from segkern.integrations.diffusers.runtime.module_checks import ModuleChecks
from segkern.integrations.diffusers.runtime.origins import Trust, check_trust
from segkern.integrations.diffusers.runtime.outputs import check_size, prediction_of, with_prediction
from segkern.integrations.diffusers.runtime.per_sample import check_attention_arguments
from segkern.integrations.diffusers.runtime.pipeline_class import (
    component_reads,
    ended_runs,
    noted_text,
    pipelines_with,
    unwatch,
    watch,
)
from segkern.integrations.diffusers.runtime.pipeline_run import (
    PipelineRun,
    at_begin,
    current_run,
    forget_at_begin,
    in_repeated_forward,
)
from segkern.integrations.diffusers.runtime.processor import norms, unwrap
from segkern.integrations.diffusers.runtime.report import Recorder, Report
from segkern.integrations.diffusers.runtime.reuse import Differences
from segkern.integrations.diffusers.runtime.sag_forward import SAGForward
from segkern.integrations.diffusers.runtime.step_planner import RunState, StepPlanner
from segkern.integrations.diffusers.runtime.support import check_model, check_pipeline, choose_layers
from segkern.integrations.specs import SAG
from segkern.integrations.specs.base import PlacedSpec, Spec

_GUIDANCES: WeakSet[Guidance] = WeakSet()  # the active ones; hooks on denoisers keep them alive


def guide(
    pipe: Any,
    *specs: Spec,
    share: bool = True,
    cfg: CFGLayout | None = None,
    conditional: ConditionalPlace | None = None,
    trust: Trust = (),
) -> Guidance:
    """Enable guidance for every run of a pipeline, until the context exits or ``remove()`` is called.

    Works with unmodified diffusers pipelines for any task (text to image, image to image, inpainting, ControlNet,
    T2I-Adapter, IP-Adapter, LoRA). Hooks on the denoiser append one branch to the batch for each spec, compute the
    guided prediction and return it in the shape that the pipeline expects; ``SAG`` uses a separate denoiser call
    instead of a branch. The pipeline's own arguments keep their meaning.

    Specs combine: each adds its scale times its difference, ``u + g (c - u) + sum_i s_i (c - p_i)``. A layer may be
    used by several specs.

    Guidance belongs to the pipeline. Another pipeline that shares the denoiser is not guided unless it has its own
    guidance, even in another thread. Calls of a guided denoiser run one at a time. Copies and pickles of the pipeline
    or its denoiser are not guided.

    segkern reads the layout of the denoiser's batch from the pipeline's public interface (call arguments, properties,
    prompt embeddings) and verifies it in every run. For a custom denoising loop, pass ``cfg`` and enter
    :meth:`Guidance.run` around the loop.

    Args:
        pipe: A pipeline with a ``UNet2DConditionModel`` (Stable Diffusion 1, 2, XL, Kolors), a ``UNetMotionModel``
            (AnimateDiff) or a supported transformer (listed in docs/models.md), or that denoiser alone. The denoiser
            may be compiled.
        specs: One or more guidance specs.
        share: Let a branch join the batch at the transformer block of its first layer, because it equals the
            conditional branch up to this block. In a UNet, that layer also shares the projections of queries, keys and
            values. The result is the same up to rounding, at a lower cost. To verify this, set ``share=False``.
        cfg: How a custom loop, or a pipeline whose layout segkern cannot read, applies classifier-free guidance:
            ``"none"``, ``"batch"`` (both predictions in one call) or ``"separate"`` (one call for each, the conditional
            prediction first). None detects it.
        conditional: Which half of the batch is conditional if ``cfg="batch"``: ``"first"`` or ``"second"``. None means
            the second.
        trust: Attention processors, block classes and functions that replace a module's ``forward``, if they are not
            part of PyTorch or diffusers. Listing one asserts that it processes each sample of a batch independently of
            its position and keeps no state between calls. Guidance appends samples to the batch, so code that would
            process them and is not listed here is refused.

    Returns:
        The active guidance, a context manager. On exit, also after an exception, it restores the original objects. It
        issues one warning if the denoiser ran and guidance had no effect.

    Raises:
        ValueError: If a pipeline, layer or spec is not supported. The message quotes it, and the pipeline is unchanged.
            A run of the pipeline raises the same error before its first step is finished if the layout of its batch is
            not supported.

    Source: SEG (arXiv 2408.00760); its official implementation for the sum with classifier-free guidance.

    Example:
        >>> from diffusers import StableDiffusionXLPipeline  # doctest: +SKIP
        >>> pipe = StableDiffusionXLPipeline.from_pretrained("path/to/checkpoint")  # doctest: +SKIP
        >>> with guide(pipe, SEG(scale=3.0, sigma=math.inf, layers="mid")) as guidance:  # doctest: +SKIP
        ...     image = pipe("a red fox", guidance_scale=5.0).images[0]
        >>> print(guidance.report())  # doctest: +SKIP
    """
    trust = check_trust(trust)
    _check_layout(cfg, conditional, specs)
    placed = [(denoiser, choose_layers(denoiser, specs)) for denoiser in check_pipeline(pipe)]
    if any(guidance._owner is pipe for guidance in _GUIDANCES):
        raise ValueError(
            f"this {type(pipe).__name__} is already guided; pass all specs to one guide call, or remove the other "
            "guidance"
        )
    if isinstance(pipe, nn.Module) and cfg is None:
        raise ValueError(
            f"guide needs a batch layout for a {type(pipe).__name__} without a pipeline: call "
            f"guide(denoiser, ..., cfg='none', 'batch' or 'separate') and use `with guidance.run(timesteps):`"
        )
    layout = (cfg, conditional == "first")
    guidance = Guidance(pipe, *placed[0], share, layout, trust)
    guidance._others = [
        Guidance(pipe, *denoiser_specs, share, layout, trust, guidance) for denoiser_specs in placed[1:]
    ]
    for part in (guidance, *guidance._others):
        part._checks.check()
    guidance._install()
    return guidance


def _check_layout(cfg: object, conditional: object, specs: Sequence[object]) -> None:
    """Raise a ValueError if ``cfg`` or ``conditional`` is invalid."""
    if cfg not in (None, "none", "batch", "separate"):
        raise ValueError(f"cfg must be 'none', 'batch', 'separate' or None, got {cfg!r}")
    if conditional not in (None, "first", "second"):
        raise ValueError(f"conditional must be 'first', 'second' or None, got {conditional!r}")
    if conditional is not None and cfg != "batch":
        raise ValueError(
            f"conditional={conditional!r} selects a half of the batch and needs cfg='batch', got cfg={cfg!r}; with "
            f"cfg='separate' the conditional call comes first"
        )
    if cfg == "separate" and any(isinstance(spec, SAG) for spec in specs):
        raise ValueError("SAG(...) needs both predictions in one batch, got cfg='separate'")


def is_guided(denoiser: nn.Module) -> bool:
    """Return True if guidance is active on a denoiser."""
    return any(guidance._acts_on(denoiser) for guidance in _GUIDANCES)


def _under_way(runs: WeakKeyDictionary[Any, int]) -> bool:
    """Return True if one of these runs may be active; they began before their pipelines were watched."""
    for pipe, ended in list(runs.items()):
        if ended_runs(pipe) != ended:
            runs.pop(pipe, None)
    return bool(runs)


class Guidance:
    """Active guidance on a pipeline; created by :func:`guide`."""

    def __init__(
        self,
        pipe: Any,
        denoiser: Denoiser,
        placed: tuple[PlacedSpec, ...],
        share: bool,
        layout: tuple[CFGLayout | None, bool],
        trust: Trust = (),
        beside: Guidance | None = None,
    ) -> None:
        self._owner = pipe  # the pipeline, or denoiser without a pipeline, whose runs are guided
        self._pipe = SimpleNamespace(unet=pipe) if isinstance(pipe, nn.Module) else pipe
        self._name = type(pipe).__name__
        self._others: list[Guidance] = []  # for the other denoisers of the pipeline
        self._denoiser = denoiser
        # May be the wrapper of torch.compile. Hooks on the wrapper are not compiled.
        self._module: nn.Module = getattr(self._pipe, denoiser.name)
        self._specs = tuple(placed_spec.spec for placed_spec in placed)
        self._cfg, self._conditional_first = layout
        self._for_others = 0  # denoiser calls made by other pipelines
        self._denoiser_guidance = DenoiserGuidance(denoiser, placed, trust=trust)
        self._checks = ModuleChecks(denoiser, self._denoiser_guidance.first, share, trust)
        self._recorder: Recorder = self._denoiser_guidance.recorder if beside is None else beside._recorder
        self._denoiser_guidance.recorder = self._recorder
        self._arguments = denoiser.arguments
        self._installed = False
        self._notes_contexts = False
        self._entered = 0  # number of open contexts
        self._main: Guidance = self if beside is None else beside  # the one that removes all
        self._leaving = False  # whether to remove the guidance after the current denoiser call
        self._lock = denoiser_lock(denoiser.model)
        self._handles: list[RemovableHandle] = []  # hooks on the denoiser while guidance is active
        self._watched: WeakSet[Any] = WeakSet()  # pipelines with this denoiser
        self._thread = threading.get_ident()  # the thread that called guide
        # Reads of the pipeline's components when no other pipeline shared its denoiser.
        self._reads = component_reads(pipe)
        # Pipelines that may be in a run that began before they were watched, with the number of their finished runs.
        self._begun: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._begun_elsewhere: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # in another thread
        self._made_since: list[Any] = []  # pipelines found at the last denoiser call outside a run
        self._nested = 0  # number of refused calls within the current denoiser call
        self._layers = self._denoiser_guidance.layers
        self._planner = StepPlanner(self._pipe, denoiser, self._specs, self._denoiser_guidance, share)
        self._sag = SAGForward(self._pipe, self._specs)
        self._runs: dict[PipelineRun, RunState] = {}  # active runs
        self._under_way = False  # whether the thread that holds the lock is in a denoiser call
        self._run: PipelineRun | None = None  # the run of that call; None outside known runs
        self._kind: CallKind | None = None  # the kind of that call
        self._pair = 0
        self._forward: Forward | None = None  # the plan of that call; None if it is not guided
        self._given: Arguments = ((), {})  # the arguments of that call, if another call follows
        self._size: int | None = None  # the batch size of that call; None for other pipelines

    def __deepcopy__(self, memo: dict[int, Any]) -> Guidance:
        """Return this object: copying an object that holds a pipeline and its guidance does not guide the copy."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Guidance belongs to a pipeline in this process and cannot be pickled; pickle the pipeline (the copy is "
            "not guided) or the result of report()"
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
        if self._entered <= 0:  # the outermost context
            self._remove(warn=kind is None)

    def remove(self) -> None:
        """Remove the guidance from the pipeline. Does nothing if it has been removed.

        If a guided denoiser call is active, the guidance is removed after that call.
        """
        self._remove(warn=True)

    def run(self, timesteps: Sequence[float] | torch.Tensor) -> PipelineRun:
        """Return a context manager to enter around a custom denoising loop.

        In the context, denoiser calls are guided as :func:`guide`'s ``cfg`` specifies. The loop combines the two
        predictions as usual, ``u + g (c - u)``.

        Args:
            timesteps: The timesteps of the loop, in the order of the loop, such as ``scheduler.timesteps``.

        Raises:
            ValueError: If ``guide`` was called without ``cfg``, or if the timesteps are not numbers.

        Example:
            >>> guidance = guide(unet, SEG(scale=3.0), cfg="batch")  # doctest: +SKIP
            >>> with guidance, guidance.run(scheduler.timesteps):  # doctest: +SKIP
            ...     for t in scheduler.timesteps:
            ...         both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            ...         u, c = unet(both, t, encoder_hidden_states=texts).sample.chunk(2)
            ...         latents = scheduler.step(u + 5.0 * (c - u), t, latents).prev_sample
        """
        if self._cfg is None:
            raise ValueError(
                "segkern cannot read the batch layout of a custom denoising loop; pass cfg='none', 'batch' or "
                "'separate' to guide"
            )
        values = timesteps.tolist() if isinstance(timesteps, torch.Tensor) else list(timesteps)
        if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise ValueError(f"timesteps must be finite numbers in the order of the loop, got {timesteps!r}")
        return PipelineRun(self._owner, {}, text=noted_text(self._owner), timesteps=timesteps)

    def report(self, image: int | None = None) -> Report:
        """Return the report so far, and warn if guidance had no effect. The same warning is issued only once.

        Args:
            image: Index of an image, for a report on this image of the batch alone; None for all images.

        Raises:
            ValueError: If there is no such image, or if batches of several sizes were generated.
        """
        report = self._recorder.report(image)
        self._recorder.warn(report, stacklevel=3)
        return report

    def _install(self) -> None:
        try:
            self._installed = True
            if self._main is self:
                if not isinstance(self._owner, nn.Module):
                    self._watch(self._owner)
                    at_begin(self._owner, self._begin_run)
                self._begun_elsewhere.update({pipe: ended_runs(pipe) for pipe in self._watch_others()})
                _GUIDANCES.add(self)
            note_contexts(self._denoiser.model)
            self._notes_contexts = True
            self._denoiser_guidance.attach()  # raises if a module is not supported
            self._denoiser_guidance.detach()
            self._denoiser_guidance.recomputation.lock = self._lock
            self._denoiser_guidance.recomputation.compiled = self._module is not self._denoiser.model
            self._handles.append(self._module.register_forward_pre_hook(Outer(self._before), with_kwargs=True))
            # This hook comes first, so that other forward hooks get the same prediction as the pipeline.
            after = Outer(self._after)
            self._handles.append(self._module.register_forward_hook(after, prepend=True, always_call=True))
            for other in self._others:
                other._install()
        except BaseException:
            self._take_off(warn=False)
            raise

    def _watch(self, pipe: Any) -> None:
        watch(pipe)
        self._watched.add(pipe)

    def _watch_others(self) -> list[Any]:
        """Watch all pipelines that share the denoisers, and return those that were not watched before."""
        modules = [guidance._module for guidance in (self, *self._others)]
        others = [pipe for pipe in pipelines_with(modules) if pipe not in self._watched]
        for pipe in others:
            self._watch(pipe)
        return others

    def _remove(self, warn: bool) -> None:
        if not self._installed:
            return
        self._leaving = True
        if any(guidance._is_inside() for guidance in (self, *self._others)):
            return
        with ExitStack() as locks:
            for guidance in (self, *self._others):
                guidance._lock.acquire()
                locks.callback(guidance._lock.release)
            # A call in another thread may have removed it, or the second of two paired calls may be missing.
            if self._installed and not self._awaits_second_call():
                self._take_off(warn)

    def _acts_on(self, denoiser: nn.Module) -> bool:
        model = getattr(denoiser, "_orig_mod", denoiser)
        return any(guidance._denoiser.model is model for guidance in (self, *self._others))

    def _is_inside(self) -> bool:
        """Return True if this thread is in a denoiser call."""
        return self._under_way and self._lock.is_held_here

    def _awaits_second_call(self) -> bool:
        """Return True if an active run has made the first of two paired calls."""
        states = [state for guidance in (self, *self._others) for state in guidance._runs.values()]
        return any(state.pending and state.layout.expects_negative() for state in states)

    def _take_off(self, warn: bool) -> None:
        self._installed = False
        for other in self._others:
            if other._installed:
                other._take_off(warn=False)
        _GUIDANCES.discard(self)
        if self._notes_contexts:
            self._notes_contexts = False
            forget_contexts(self._denoiser.model)
        for pipe in list(self._watched):
            unwatch(pipe)
        if not isinstance(self._owner, nn.Module):
            forget_at_begin(self._owner, self._begin_run)
        self._watched.clear()
        had_hooks = bool(self._handles)
        while self._handles:
            self._handles.pop().remove()
        self._clear()
        self._runs.clear()
        # unfuse_qkv_projections will restore these processors.
        saved = getattr(self._denoiser.model, "original_attn_processors", None)
        if isinstance(saved, dict):
            saved.update({name: unwrap(processor) for name, processor in saved.items()})
        if warn and had_hooks and (self._recorder.forwards or self._for_others):
            if not self._recorder.forwards:
                self._recorder.cause = (
                    f"the {self._denoiser.name} of this {self._name} was called only by other pipelines; pass the "
                    f"pipeline that calls it to guide"
                )
            self._recorder.warn(self._recorder.report(), stacklevel=5)

    def _clear(self) -> None:
        """Remove the hooks and processors of one denoiser call, so users see the original processors between calls."""
        self._forward, self._given = None, ((), {})
        self._denoiser_guidance.forget()
        self._denoiser_guidance.detach()

    def _state(self, run: PipelineRun) -> RunState:
        """Return the state of a run of the guided pipeline."""
        state = self._runs.get(run)
        if state is None:
            layout = BatchLayout(
                run,
                self._name,
                conditional_first=self._denoiser.conditional_first if self._cfg is None else self._conditional_first,
                cfg=self._cfg,
            )
            state = self._runs[run] = RunState(layout, Differences(self._specs))
        return state

    def _begin_run(self, run: PipelineRun) -> None:
        """Check before and after a run that the pipeline still has the guided denoisers."""
        if self._installed:
            self._check_denoisers()
            run.at_end(self._check_run)

    def _check_run(self, run: PipelineRun, failed: bool) -> None:
        if self._installed and not failed:
            self._check_denoisers()

    def _check_denoisers(self) -> None:
        """Raise a ValueError if the denoiser of the pipeline was replaced."""
        for guidance in (self, *self._others):
            component = guidance._denoiser.name
            model = getattr(self._pipe, component, None)
            if getattr(model, "_orig_mod", model) is not guidance._denoiser.model:
                raise ValueError(
                    f"the {component} of this {self._name} was replaced while guided, and the new one is not guided; "
                    f"remove the guidance and call guide again"
                )

    def _end_run(self, run: PipelineRun, failed: bool) -> None:
        """Discard the state of a run, and clean up after an interrupt, for which PyTorch calls no hooks."""
        state = self._runs.pop(run, None)
        if self._under_way and self._run is run and self._lock.is_held_here:
            self._clear()
            self._end_forward()
        if self._main._leaving and self._main._installed:
            self._main._remove(warn=not failed)
        if state is not None and not failed:
            state.drop_pending(self._name, all_of_them=True)

    def _end_forward(self) -> None:
        self._under_way, self._run, self._kind, self._size = False, None, None, None
        self._lock.release()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Before a denoiser call: plan the call and set up blocks and layers."""
        if module is not self._module or in_repeated_forward():  # copies are not guided
            return None
        run = current_run()
        if run is None and not self._main._is_of_others():
            self._refuse_outside_run()
        if self._is_inside():
            self._nested += 1
            raise RuntimeError(
                f"the {type(self._denoiser.model).__name__} of this {self._name} was called within its own guided "
                f"call, perhaps by a hook; call it between steps, as in callback_on_step_end"
            )
        self._lock.acquire()
        if not self._installed:  # removed while this thread waited for the lock
            self._lock.release()
            return None
        self._under_way, self._run, self._forward = True, run, None
        if run is not None and self not in run.state:
            run.state[self] = True
            run.at_end(self._end_run)
        if run is None or run.pipe is not self._owner:
            self._for_others += 1
            if run is not None:
                self._main._begun.pop(run.pipe, None)
                self._main._begun_elsewhere.pop(run.pipe, None)
            return None
        return self._begin(run, args, kwargs)

    def _is_of_others(self) -> bool:
        """Return True if a call outside known runs belongs to another pipeline whose run began before it was watched.

        This is the case if a pipeline was created from this pipeline's components since, or if the call is in another
        thread than the one that called ``guide`` and another pipeline may be in a run.
        """
        elsewhere = threading.get_ident() != self._thread
        if _under_way(self._begun) or (elsewhere and _under_way(self._begun_elsewhere)):
            return True
        self._made_since = self._watch_others()
        reads, self._reads = self._reads, component_reads(self._owner)
        for pipe in self._made_since:
            (self._begun if self._reads > reads else self._begun_elsewhere)[pipe] = ended_runs(pipe)
        return bool(self._begun) or (elsewhere and bool(self._begun_elsewhere))

    def _refuse_outside_run(self) -> NoReturn:
        """Raise a ValueError for a denoiser call outside a run."""
        others = ", ".join(type(pipe).__name__ for pipe in self._main._made_since)
        since = f" ({others} shares it and was created since: run it again)" if others else ""
        raise ValueError(
            f"the {type(self._denoiser.model).__name__} of a guided {self._name} was called outside a run of that "
            f"pipeline{since}; for a custom denoising loop, pass cfg='none', 'batch' or 'separate' to guide and use "
            f"`with guidance.run(timesteps):`"
        )

    def _begin(self, run: PipelineRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Begin a denoiser call of the guided pipeline."""
        denoiser = self._denoiser
        latents = denoiser.latents(args, kwargs)
        self._size = len(latents)
        check_attention_arguments(self._arguments, args, kwargs, denoiser.model)
        if not denoiser.is_step(args, kwargs):
            if not run.arguments and not run.is_loop:
                raise ValueError(
                    f"this {self._name} uses skip-layer guidance, which guide cannot detect if the class's function is "
                    f"called directly, as in type(pipe).__call__(pipe, ...); call pipe(...)"
                )
            return None
        run.checkpoints.check(latents, type(denoiser.model).__name__)
        state = self._state(run)
        call = state.layout.of_call(latents, denoiser.prompt(args, kwargs), denoiser.timestep(args, kwargs))
        self._kind, self._pair = call.kind, call.pair
        if call.kind is CallKind.PROMPT and state.pending:
            state.drop_pending(self._name)
        if self._main._leaving and call.kind is not CallKind.NEGATIVE:
            self._end_forward()  # no hook does this after an early return
            self._main._take_off(warn=True)
            return None
        self._recorder.forwards += 1
        if call.kind is CallKind.NEGATIVE:
            self._planner.check_negative_call()
            self._planner.check_unexpected_negative_call(run, state)
            return None
        forward = self._planner.forward(run, state, call, args, kwargs)
        self._checks.before(run.number, forward, self._size)
        if forward is None or not (forward.branches or forward.sag):
            self._forward = forward
            return None
        check_model(denoiser.model)
        self._denoiser_guidance.attach(self._checks.watches)
        self._forward = forward
        if forward.sag:
            self._given = self._planner.reference_inputs(forward, args, kwargs)
        self._denoiser_guidance.tell(forward, args, kwargs)
        return self._planner.grown(forward, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a denoiser call: fold the branches into the output and collect the reports of the layers."""
        if module is not self._module or in_repeated_forward() or not self._is_inside():
            return None
        if self._nested:  # the refused call
            self._nested -= 1
            return None
        try:
            changed = self._end(output)
            leaves = self._main._leaving and output is not None and not self._main._awaits_second_call()
        finally:
            self._end_forward()
        if leaves and self._main._installed:
            self._main._take_off(warn=True)
        return changed

    def _end(self, output: Any) -> Any:
        """Return the denoiser's output with guidance added; None to keep it."""
        run, forward = self._run, self._forward
        if output is None:  # an exception
            self._clear()
            return None
        if forward is None and self._size is not None:
            check_size(output, self._size, type(self._denoiser.model).__name__)
        if run is None or (forward is None and self._kind is not CallKind.NEGATIVE):
            return None
        state = self._runs[run]
        try:
            prediction = prediction_of(output)
            sample = batch_of(prediction)
            if forward is not None:
                shift, folded = self._folded(forward, state, sample)
                if forward.pair is not None:
                    state.pending[forward.pair] = shift, forward.rescaled
            else:
                shift, rescaled = state.pending.pop(self._pair, (None, None))
                folded = sample if shift is None else shifted(sample, shift, rescaled)
        finally:
            self._clear()
        result = list(folded.unbind()) if isinstance(prediction, list) else folded
        return with_prediction(output, result, None if forward is None else forward.batch)

    def _folded(
        self, forward: Forward, state: RunState, sample: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the sum of the differences, and the guided prediction for the pipeline's own batch."""
        batch, moved = forward.batch, self._denoiser_guidance.reports(forward)
        expected = batch.with_branches(len(forward.branches))
        if sample.shape[0] != expected:
            raise RuntimeError(f"the guided denoiser returned {sample.shape[0]} predictions for a batch of {expected}")
        if forward.sag:  # in a CUDA graph, the second denoiser call overwrites the output of the first
            sample, moved = sample.clone(), {key: pair.clone() for key, pair in moved.items()}
        guided = [(forward.strengths[index], state.differences.last(index)) for index in forward.reused]
        for branch, index in enumerate(forward.branches):
            delta = difference(sample, batch, branch)
            state.differences.keep(index, delta)
            guided.append((forward.strengths[index], delta))
            if index in self._planner.negative:
                moved[index, ""] = torch.stack([norms(delta), norms(sample[batch.conditional])])
        for index in forward.sag:
            layer = next(layer for layer in self._layers if index in layer.readers)
            with self._denoiser_guidance.quiet(forward):
                delta, moved[index, layer.info.module] = self._sag.difference(
                    index, self._module, self._arguments, self._given, sample[forward.reference], layer
                )
            state.differences.keep(index, delta)
            guided.append((forward.strengths[index], delta))
        self._recorder.add(moved, sample.dtype)
        shift = summed(guided)
        only_negative = forward.pair is not None and forward.rescaled is not None  # the prompt's own is measured
        return shift, fold(sample, batch, None if only_negative else shift, forward.rescaled)
