# SPDX-License-Identifier: Apache-2.0
"""``guide``: guidance on a stock pipeline, through hooks that come off again."""

from __future__ import annotations

import math
import threading
import warnings
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
from segkern.integrations.diffusers.runtime.report import GuidanceWarning, Recorder, Report
from segkern.integrations.diffusers.runtime.reuse import Differences
from segkern.integrations.diffusers.runtime.sag_forward import SAGForward
from segkern.integrations.diffusers.runtime.step_planner import RunState, StepPlanner
from segkern.integrations.diffusers.runtime.support import check_model, check_pipeline, choose_layers
from segkern.integrations.specs import SAG
from segkern.integrations.specs.base import PlacedSpec, Spec

_GUIDANCES: WeakSet[Guidance] = WeakSet()  # at work; hooks on denoisers keep them alive


def guide(
    pipe: Any,
    *specs: Spec,
    share: bool = True,
    cfg: CFGLayout | None = None,
    conditional: ConditionalPlace | None = None,
    trust: Trust = (),
) -> Guidance:
    """Turn on guidance for every run of a pipeline, until the context is left or ``remove()`` is called.

    The pipeline stays the stock one, whatever its task (text to image, image to image, inpainting,
    ControlNet, T2I-Adapter, IP-Adapter, LoRA): hooks on its denoiser append one branch for each spec (``SAG`` has
    a forward of its own), compute the guided prediction and hand it back in the shape the pipeline expects. The
    pipeline's own arguments mean what they always meant. Specs combine: each adds its scale times its difference,
    ``u + g (c - u) + sum_i s_i (c - p_i)``, and a layer may belong to several. Guidance belongs to the pipeline:
    another one that shares its denoiser runs unguided, or with guidances of its own, in another thread too: forwards
    of a guided denoiser come one after the other. Copies and pickles of the pipeline or its denoiser are unguided.

    The layout of the denoiser's batch is read from what the pipeline says (the arguments of its call, its properties,
    its texts) and verified in every run. In a denoising loop of your own nothing says it: give ``cfg``, and enter
    :meth:`Guidance.run` around the loop.

    Args:
        pipe: a pipeline with a ``UNet2DConditionModel`` (Stable Diffusion 1, 2, XL, Kolors), a ``UNetMotionModel``
            (AnimateDiff) or one of the known transformers (docs/models.md lists them), or that denoiser alone. It may
            be compiled.
        specs: the guidances, at least one.
        share: let a branch join the batch only at the transformer block of its first layer, since it equals the
            conditional branch before; a UNet's layer projects the branch's queries, keys and values once for both.
            The result is the same, up to rounding, and costs less; False is there to check.
        cfg: classifier-free guidance of a loop, or of a pipeline that does not say: ``"none"``, ``"batch"`` (both
            predictions in one call) or ``"separate"`` (a call for each, the conditional one first); None to find it.
        conditional: the half of a batch with the conditional samples, ``"first"`` or ``"second"``, with
            ``cfg="batch"``; the second if None.
        trust: classes of attention processors and blocks, and functions that replaced a module's ``forward``, which are
            not of PyTorch or diffusers: the statement that each treats every sample of a batch by itself, wherever it
            stands, and keeps nothing from one forward to the next. Guidance appends samples to the batch, so any that
            would see them and is not named here is refused.

    Returns:
        The active guidance, a context manager. Leaving it, by an exception too, puts back the very objects
        that were there. It warns if the denoiser ran but a guidance fired never or moved nothing.

    Raises:
        ValueError: for a pipeline, layer or spec that does not fit; the message quotes it and the pipeline is
            left as it was. A run of the pipeline raises it before its first step for a batch that is laid out in
            another way.

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
            f"this {type(pipe).__name__} is guided already; pass several specs in one guide call, or remove the other"
        )
    if isinstance(pipe, nn.Module) and cfg is None:
        raise ValueError(
            f"guide needs the layout of a {type(pipe).__name__}'s batches where there is no pipeline to tell it: "
            f"guide(denoiser, ..., cfg='none', 'batch' or 'separate') and `with guidance.run(timesteps):`"
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
    """Raise a ValueError for a layout that there is not."""
    if cfg not in (None, "none", "batch", "separate"):
        raise ValueError(f"cfg must be 'none', 'batch', 'separate' or None, got {cfg!r}")
    if conditional not in (None, "first", "second"):
        raise ValueError(f"conditional must be 'first', 'second' or None, got {conditional!r}")
    if conditional is not None and cfg != "batch":
        raise ValueError(
            f"conditional={conditional!r} tells the halves of a batch apart and needs cfg='batch', got cfg={cfg!r}; "
            f"with cfg='separate' the conditional call comes first"
        )
    if cfg == "separate" and any(isinstance(spec, SAG) for spec in specs):
        raise ValueError("SAG(...) needs both predictions in one batch, got cfg='separate'")


def is_guided(denoiser: nn.Module) -> bool:
    """True if a guidance acts on a denoiser."""
    return any(guidance._acts_on(denoiser) for guidance in _GUIDANCES)


def _under_way(runs: WeakKeyDictionary[Any, int]) -> bool:
    """True if any of these runs, which began before their pipelines were watched, may be under way."""
    for pipe, ended in list(runs.items()):
        if ended_runs(pipe) != ended:
            runs.pop(pipe, None)
    return bool(runs)


class Guidance:
    """Guidance at work on a pipeline; made by :func:`guide`."""

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
        self._owner = pipe  # whose runs are guided: a pipeline, or a denoiser alone
        self._pipe = SimpleNamespace(unet=pipe) if isinstance(pipe, nn.Module) else pipe
        self._name = type(pipe).__name__
        self._others: list[Guidance] = []  # of denoisers that take turns with this one in a run
        self._denoiser = denoiser
        # torch.compile's wrapper, if there is one: bookkeeping stays outside
        self._module: nn.Module = getattr(self._pipe, denoiser.name)
        self._specs = tuple(placed_spec.spec for placed_spec in placed)
        self._cfg, self._conditional_first = layout
        self._for_others = 0  # forwards that other pipelines asked for
        self._denoiser_guidance = DenoiserGuidance(denoiser, placed, trust=trust)
        self._checks = ModuleChecks(denoiser, self._denoiser_guidance.first, share, trust)
        self._recorder: Recorder = self._denoiser_guidance.recorder if beside is None else beside._recorder
        self._denoiser_guidance.recorder = self._recorder
        self._arguments = denoiser.arguments
        self._installed = False
        self._notes_contexts = False
        self._entered = 0  # contexts that are open
        self._main: Guidance = self if beside is None else beside  # which removes them all
        self._leaving = False  # as soon as the forward under way is over
        self._lock = denoiser_lock(denoiser.model)
        self._handles: list[RemovableHandle] = []  # on the denoiser, for as long as it is guided
        self._watched: WeakSet[Any] = WeakSet()  # pipelines with this denoiser
        self._thread = threading.get_ident()  # that calls guide
        self._reads = component_reads(
            pipe
        )  # of the pipeline's components, after which there were no others that share its denoiser
        # Those that may be in a run which began before they were watched, with the number of their runs that had ended.
        self._begun: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._begun_elsewhere: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # in another thread
        self._made_since: list[Any] = []  # others, when a call outside of runs came last
        self._nested = 0  # calls within a forward, which were refused
        self._layers = self._denoiser_guidance.layers
        self._planner = StepPlanner(self._pipe, denoiser, self._specs, self._denoiser_guidance.first, share)
        self._sag = SAGForward(self._pipe, self._specs)
        self._runs: dict[PipelineRun, RunState] = {}  # under way
        self._under_way = False  # a forward of the denoiser, in the thread that has the lock
        self._run: PipelineRun | None = None  # whose forward that is; None for one outside of known runs
        self._kind: CallKind | None = None  # of that call
        self._pair = 0
        self._forward: Forward | None = None  # its plan; None when it is a plain one
        self._given: Arguments = ((), {})  # its arguments, where another forward follows
        self._size: int | None = None  # of its batch; None for another pipeline's

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

    def run(self, timesteps: Sequence[float] | torch.Tensor) -> PipelineRun:
        """A run of a denoising loop of your own, a context manager around it.

        Inside, calls of the denoiser are guided as ``cfg`` of :func:`guide` says. The prediction of the two parts is
        combined as usual, ``u + g (c - u)``.

        Args:
            timesteps: those of the loop, in the order in which it takes them, such as ``scheduler.timesteps``.

        Raises:
            ValueError: without ``cfg``, and for timesteps that are no numbers.

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
                "a denoising loop of your own does not tell the layout of its batches: "
                "guide(..., cfg='none', 'batch' or 'separate')"
            )
        values = timesteps.tolist() if isinstance(timesteps, torch.Tensor) else list(timesteps)
        if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise ValueError(f"timesteps must be numbers, in the order in which the loop takes them, got {timesteps!r}")
        return PipelineRun(self._owner, {}, text=noted_text(self._owner), timesteps=timesteps)

    def report(self) -> Report:
        """Report the guidance so far; warns if it fired never or moved nothing."""
        report = self._recorder.report()
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
            self._denoiser_guidance.attach()  # says now what would not do
            self._denoiser_guidance.detach()
            self._denoiser_guidance.recomputation.lock = self._lock
            self._denoiser_guidance.recomputation.compiled = self._module is not self._denoiser.model
            self._handles.append(self._module.register_forward_pre_hook(Outer(self._before), with_kwargs=True))
            # Other forward hooks get the prediction the pipeline gets, so this one comes first.
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
        """Watch all pipelines that share the denoisers; those that were not watched yet."""
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
            # Another thread's forward may have taken it off, or a run owe the second of two calls.
            if self._installed and not self._awaits_second_call():
                self._take_off(warn)

    def _acts_on(self, denoiser: nn.Module) -> bool:
        model = getattr(denoiser, "_orig_mod", denoiser)
        return any(guidance._denoiser.model is model for guidance in (self, *self._others))

    def _is_inside(self) -> bool:
        """True if this thread is in a forward of the denoiser."""
        return self._under_way and self._lock.is_held_here

    def _awaits_second_call(self) -> bool:
        """True if a run that is under way has made one of two calls that belong together."""
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
        ran = had_hooks and self._recorder.forwards > 0
        while self._handles:
            self._handles.pop().remove()
        self._clear()
        self._runs.clear()
        saved = getattr(
            self._denoiser.model, "original_attn_processors", None
        )  # what unfuse_qkv_projections will put back
        if isinstance(saved, dict):
            saved.update({name: unwrap(processor) for name, processor in saved.items()})
        component, pipe = self._denoiser.name, self._name
        if warn and had_hooks and self._recorder.forwards == 0 and self._for_others:
            message = (
                f"the {component} of this {pipe} ran for other pipelines only; give guide the pipeline that runs it"
            )
            warnings.warn(f"guidance did nothing: {message}", GuidanceWarning, stacklevel=4)
        if ran and warn:
            self._recorder.warn(self._recorder.report(), stacklevel=5)

    def _clear(self) -> None:
        """Between forwards the denoiser has its own processors, to be looked at or changed, and nothing is kept."""
        self._forward, self._given = None, ((), {})
        self._layers.forget()
        self._denoiser_guidance.detach()

    def _state(self, run: PipelineRun) -> RunState:
        """The state of a run of the guided pipeline."""
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
        """Check before a run and after it that the pipeline has the denoisers that are guided."""
        if self._installed:
            self._check_denoisers()
            run.at_end(self._check_run)

    def _check_run(self, run: PipelineRun, failed: bool) -> None:
        if self._installed and not failed:
            self._check_denoisers()

    def _check_denoisers(self) -> None:
        """Raise a ValueError if the pipeline has another denoiser than the one that is guided."""
        for guidance in (self, *self._others):
            component = guidance._denoiser.name
            model = getattr(self._pipe, component, None)
            if getattr(model, "_orig_mod", model) is not guidance._denoiser.model:
                raise ValueError(
                    f"this {self._name} was given another {component} while guided, which runs unguided; remove the "
                    f"guidance and call guide again"
                )

    def _end_run(self, run: PipelineRun, failed: bool) -> None:
        """Forget a run that has ended, and clean up after an interrupt, for which PyTorch calls no hooks."""
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
        """Before the denoiser: decide what this forward does and tell the blocks and layers."""
        if module is not self._module or in_repeated_forward():  # a copy is not guided
            return None
        run = current_run()
        if run is None and not self._main._is_of_others():
            self._refuse_outside_run()
        if self._is_inside():
            self._nested += 1
            raise RuntimeError(
                f"the {type(self._denoiser.model).__name__} of this {self._name} was called within its own guided "
                f"forward, by a hook perhaps; call it between steps, as in callback_on_step_end"
            )
        self._lock.acquire()
        if not self._installed:  # taken off while this thread waited
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
        """True if a call outside of known runs is of another pipeline, whose run began before it was watched.

        It is where components of this pipeline were read since, as to make another one, and one was made; or in another
        thread than the one that called ``guide``, while others may be in a run.
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
        """Raise a ValueError for a call of the denoiser in no run."""
        others = ", ".join(type(pipe).__name__ for pipe in self._main._made_since)
        since = f" ({others} shares it and was made since: run it again)" if others else ""
        raise ValueError(
            f"the {type(self._denoiser.model).__name__} of a guided {self._name} was called outside a run of "
            f"it{since}; for a denoising loop of your own: guide(..., cfg='none', 'batch' or 'separate') and "
            f"`with guidance.run(timesteps):`"
        )

    def _begin(self, run: PipelineRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Begin a forward of the guided pipeline."""
        denoiser = self._denoiser
        latents = denoiser.latents(args, kwargs)
        self._size = len(latents)
        check_attention_arguments(self._arguments, args, kwargs, denoiser.model)
        if not denoiser.is_step(args, kwargs):
            if not run.arguments and not run.is_loop:
                raise ValueError(
                    f"this {self._name} runs skip-layer guidance, which measures its conditional prediction, and guide "
                    f"does not see that in a call of the class's function; call pipe(...)"
                )
            return None
        run.checkpoints.check(latents, type(denoiser.model).__name__)
        state = self._state(run)
        call = state.layout.of_call(latents, denoiser.prompt(args, kwargs), denoiser.timestep(args, kwargs))
        self._kind, self._pair = call.kind, call.pair
        if call.kind is CallKind.PROMPT and state.pending:
            state.drop_pending(self._name)
        if self._main._leaving and call.kind is not CallKind.NEGATIVE:
            self._end_forward()  # no hook will
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
        """After the denoiser: fold the branches back and take down what the layers report."""
        if module is not self._module or in_repeated_forward() or not self._is_inside():
            return None
        if self._nested:  # the call that was refused
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
        """The denoiser's output with the guidance in it; None for the one it gave."""
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
        """The sum of the differences, and the guided prediction of the pipeline's own batch."""
        batch, moved = forward.batch, self._denoiser_guidance.reports(forward)
        expected = batch.with_branches(len(forward.branches))
        if sample.shape[0] != expected:
            raise RuntimeError(f"the guided denoiser gave {sample.shape[0]} predictions for a batch of {expected}")
        if forward.sag:  # the second forward of a denoiser in a CUDA graph writes where the first one did
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
