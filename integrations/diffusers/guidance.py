# SPDX-License-Identifier: Apache-2.0
"""``guide``: guidance on a stock pipeline, through hooks that come off again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.integrations.diffusers.acting import Acting
from segkern.integrations.diffusers.architectures import batch_of
from segkern.integrations.diffusers.branches import Arguments, difference, fold, shifted, summed
from segkern.integrations.diffusers.degradations import Degradations
from segkern.integrations.diffusers.denoisers import Denoiser
from segkern.integrations.diffusers.guided_layers import Forward
from segkern.integrations.diffusers.negative import negative_text
from segkern.integrations.diffusers.processor import norms, unwrap
from segkern.integrations.diffusers.report import Recorder, Report
from segkern.integrations.diffusers.reuse import Differences
from segkern.integrations.diffusers.schedule import Run, Step, number
from segkern.integrations.diffusers.spec import Chosen, Spec
from segkern.integrations.diffusers.specs import CFG, PAG, SAG
from segkern.integrations.diffusers.support import GUIDED, check_model, check_pipeline, choose_layers


def guide(pipe: Any, *specs: Spec, share: bool = True) -> Guidance:
    """Turn on guidance for every run of a pipeline, until the context is left or ``remove()`` is called.

    The pipeline stays the stock one, whatever its task (text to image, image to image, inpainting,
    ControlNet, T2I-Adapter, IP-Adapter, LoRA): hooks on its denoiser append one branch for each spec (``SAG`` has
    a forward of its own), compute the guided prediction and hand it back in the shape the pipeline expects. The
    pipeline's own arguments mean what they always meant. Specs combine: each adds its scale times its difference,
    ``u + g (c - u) + sum_i s_i (c - p_i)``, and a layer may belong to several. Guidance belongs to the pipeline:
    another one that shares its denoiser runs unguided.

    Args:
        pipe: a pipeline with a ``UNet2DConditionModel`` (Stable Diffusion 1, 2, XL, Kolors), a ``UNetMotionModel``
            (AnimateDiff) or one of the known transformers (docs/models.md lists them). Its denoiser may be compiled.
        specs: the guidances, at least one.
        share: let a branch join the batch only at the transformer block of its first layer, since it equals the
            conditional branch before; a UNet's layer projects the branch's queries, keys and values once for both.
            The result is the same, up to rounding, and costs less; False is there to check.

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
    chosen = [(denoiser, choose_layers(denoiser, specs)) for denoiser in check_pipeline(pipe)]
    guidance = Guidance(pipe, *chosen[0], share)
    guidance._others = [Guidance(pipe, *each, share, guidance) for each in chosen[1:]]
    guidance._install()
    return guidance


class Guidance:
    """Guidance at work on a pipeline; made by :func:`guide`."""

    def __init__(
        self, pipe: Any, kind: Denoiser, chosen: tuple[Chosen, ...], share: bool, beside: Guidance | None = None
    ) -> None:
        self._pipe = pipe
        self._others: list[Guidance] = []  # of denoisers that take turns with this one in a run
        self._kind = kind
        # torch.compile's wrapper, if there is one: bookkeeping stays outside
        self._denoiser: nn.Module = getattr(pipe, kind.name)
        self._specs = tuple(one.spec for one in chosen)
        self._share = share
        self._run: Run = Run(pipe) if beside is None else beside._run
        self._for_others = 0  # forwards that other pipelines asked for
        self._runs = 0  # that this denoiser has had a part in
        self._acting = Acting(kind, chosen)
        self._recorder: Recorder = self._acting.recorder if beside is None else beside._recorder
        self._arguments = kind.arguments
        self._installed = False
        self._handles: list[RemovableHandle] = []  # on the denoiser, for as long as it is guided
        self._layers = self._acting.layers
        self._first = self._acting.first  # where each guidance's branch joins
        self._negative = {i: negative_text(pipe, spec) for i, spec in enumerate(self._specs) if isinstance(spec, CFG)}
        self._degradations = Degradations(pipe, kind.model, self._specs)
        self._forward: Forward | None = None  # the one under way; None when it is a plain one
        self._given: Arguments = ((), {})  # its arguments, where another forward follows
        # What the next call for a negative prompt adds, with the guidance scale where it alone may change.
        self._owed: tuple[torch.Tensor | None, float | None] | None = None
        self._differences = Differences(self._specs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Guidance:
        """A copy of the pipeline takes the hooks along, but they act on the original alone."""
        return self

    def __enter__(self) -> Guidance:
        if not self._handles:
            raise RuntimeError("this guidance has been removed; call guide again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove(warn=kind is None)

    def remove(self) -> None:
        """Take the guidance off the pipeline; nothing happens when it is off already."""
        self._remove(warn=True)

    def report(self) -> Report:
        """What the guidance did so far; warns if it fired never or moved nothing."""
        report = self._recorder.report()
        self._recorder.warn(report, stacklevel=3)
        return report

    def _install(self) -> None:
        try:
            self._installed = True
            GUIDED.add(self._kind.model)
            self._acting.attach()  # says now what would not do
            self._acting.detach()
            self._handles.append(self._denoiser.register_forward_pre_hook(self._before, with_kwargs=True))
            # Other forward hooks get the prediction the pipeline gets, so this one comes first.
            self._handles.append(self._denoiser.register_forward_hook(self._after, prepend=True, always_call=True))
            for other in self._others:
                other._install()
        except BaseException:
            self._remove(warn=False)
            raise

    def _remove(self, warn: bool) -> None:
        if not self._installed:
            return
        self._installed = False
        for other in self._others:
            other._remove(warn=False)
        GUIDED.discard(self._kind.model)
        had_hooks = bool(self._handles)
        ran = had_hooks and self._recorder.forwards > 0
        while self._handles:
            self._handles.pop().remove()
        self._acting.detach()
        self._differences.forget()
        self._layers.forget()
        self._forward, self._given, self._owed = None, ((), {}), None
        saved = getattr(self._kind.model, "original_attn_processors", None)  # what unfuse_qkv_projections will put back
        if isinstance(saved, dict):
            saved.update({name: unwrap(processor) for name, processor in saved.items()})
        if warn and had_hooks and self._recorder.forwards == 0 and self._for_others:
            warnings.warn(
                f"guidance did nothing: the {self._kind.name} of this {type(self._pipe).__name__} ran for other "
                f"pipelines only; give guide the pipeline that runs it",
                UserWarning,
                stacklevel=3,
            )
        elif warn and not ran and had_hooks and getattr(self._pipe, self._kind.name) is not self._denoiser:
            warnings.warn(
                f"guidance did nothing: this {type(self._pipe).__name__} was given another {self._kind.name} while "
                f"guided; call guide after replacing it",
                UserWarning,
                stacklevel=3,
            )
        if ran and warn:
            self._recorder.warn(self._recorder.report(), stacklevel=4)

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Before the denoiser: decide what this forward does and tell the blocks and layers."""
        if module is not self._denoiser or self._degradations.running:  # a copy is not guided
            return None
        self._forward = None
        caller = self._run.caller()
        self._for_others += caller is None
        part = "other" if caller is None else self._kind.part(caller, args, kwargs)
        if caller is None or part in ("other", "unconditional"):
            self._acting.detach()
            if part == "unconditional":
                self._recorder.forwards += 1
            else:
                self._owed = None
            return None
        self._owed = None
        forward = self._plan(caller, args, kwargs)
        plain = forward is None or not (forward.branches or forward.degrading)
        if plain:
            self._acting.detach()
        else:
            self._acting.attach()
        self._recorder.forwards += 1
        self._forward = forward
        if forward is None or plain:
            return None
        if forward.degrading:
            self._given = self._reference_inputs(forward, args, kwargs)
        check_model(self._kind.model)
        self._acting.tell(forward, args, kwargs)
        return self._grown(forward, args, kwargs)

    def _plan(self, caller: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward | None:
        """What the coming forward does; None when it is a plain one."""
        step = self._run.next_step()
        if self._runs != self._run.count:  # a new run, whether a guidance acts at its beginning or not
            self._runs = self._run.count
            self._differences.forget()
        sample = self._kind.sample(args, kwargs)
        strengths = self._strengths(step, args, kwargs)
        if not strengths:
            return None
        computed = [index for index in strengths if self._differences.due(index, step.number, sample.shape)]
        branches = [index for index in computed if not isinstance(self._specs[index], SAG)]
        degrading = tuple(index for index in computed if isinstance(self._specs[index], SAG))
        reused = tuple(index for index in strengths if index not in computed)
        cfg = self._run.is_guided_by_text(caller)
        batch = self._kind.batch(self._run, sample.shape[0], len(branches), cfg)
        if batch.first and any(index in self._negative for index in strengths):
            raise ValueError(
                f"this {type(self._pipe).__name__} runs classifier-free guidance itself; call it with "
                f"guidance_scale=1, or leave CFG(...) out"
            )
        ordered = tuple(sorted(branches, key=lambda index: self._first[index]))
        negative = [batch.branch(i) for i, index in enumerate(ordered) if index in self._negative]
        reference = negative[0] if negative else batch.reference
        rescaled = self._kind.rescaled_guidance_scale(self._run, caller) if cfg else None
        told = strengths, reused, degrading, reference, cfg, rescaled, self._kind.frames(sample)
        forward = Forward(batch, ordered, self._first, True, *told)
        shares = self._share and self._kind.can_share(forward, args, kwargs)
        return replace(forward, share=shares)

    def _reference_inputs(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Arguments of the samples that are degraded, taken before the denoiser takes any of them apart."""
        batch = forward.batch
        if forward.reference == batch.reference:
            return self._arguments.take(args, kwargs, batch, batch.reference)
        args, kwargs = self._arguments.take(args, kwargs, batch, batch.conditional)
        (text,) = self._negative.values()
        return text.put(self._arguments, args, kwargs, slice(0, batch.samples))

    def _strengths(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, float]:
        """Of the guidances that act in the coming forward."""
        timestep = None
        if any(isinstance(spec, PAG) and spec.adaptive_scale for spec in self._specs):
            timestep = number(self._kind.timestep(self._pipe.scheduler, step.call, args, kwargs))
        found = {index: spec.strength(step.fraction, timestep) for index, spec in enumerate(self._specs)}
        return {index: strength for index, strength in found.items() if strength != 0.0}

    def _grown(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The denoiser's arguments with the branches that join before its first block; None for no change."""
        grown = self._kind.grown(forward, args, kwargs)
        if grown is None or forward.joined(-1) == 0:
            return grown
        args, kwargs = grown
        for branch, index in enumerate(forward.branches):
            if index in self._negative:
                text, samples = self._negative[index], forward.batch.branch(branch)
                args, kwargs = text.put(self._arguments, args, kwargs, samples)
        return args, kwargs

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the denoiser: fold the branches back and take down what the layers report."""
        forward, owed = self._forward, self._owed
        if module is not self._denoiser or self._degradations.running or (forward is None and owed is None):
            return None
        self._forward = None
        try:
            if output is None:  # an exception
                self._owed = None
                return None
            sample = batch_of(output[0])
            if forward is not None:
                folded = self._folded(forward, sample)
            else:
                self._owed = None
                shift, rescaled = owed or (None, None)
                folded = sample if shift is None else shifted(sample, shift, rescaled)
        finally:
            self._layers.forget()
            self._acting.detach()  # between forwards the denoiser has its own processors, to be looked at or changed
            self._given = ((), {})
        result = list(folded.unbind()) if isinstance(output[0], list) else folded
        return (result, *output[1:]) if isinstance(output, tuple) else type(output)(sample=result)

    def _folded(self, forward: Forward, sample: torch.Tensor) -> torch.Tensor:
        """The prediction of the pipeline's own batch with every guidance in it."""
        batch, moved = forward.batch, self._acting.reports(forward)
        expected = batch.with_branches(len(forward.branches))
        if sample.shape[0] != expected:
            raise RuntimeError(f"the guided denoiser gave {sample.shape[0]} predictions for a batch of {expected}")
        if forward.degrading:  # the second forward of a denoiser in a CUDA graph writes where the first one did
            sample, moved = sample.clone(), {key: pair.clone() for key, pair in moved.items()}
        guided = [(forward.strengths[index], self._differences.last(index)) for index in forward.reused]
        for branch, index in enumerate(forward.branches):
            found = difference(sample, batch, branch)
            self._differences.keep(index, found)
            guided.append((forward.strengths[index], found))
            if index in self._negative:
                moved[index, ""] = torch.stack([norms(found), norms(sample[batch.conditional])])
        for index in forward.degrading:
            layer = next(layer for layer in self._layers if index in layer.readers)
            with self._acting.quiet():
                found, moved[index, layer.info.module] = self._degradations.difference(
                    index, self._denoiser, self._arguments, self._given, sample[forward.reference], layer
                )
            self._differences.keep(index, found)
            guided.append((forward.strengths[index], found))
        self._recorder.add(moved, sample.dtype)
        shift = summed(guided)
        if not forward.cfg or batch.first:
            return fold(sample, batch, shift, forward.rescaled)
        self._owed = shift, forward.rescaled  # a call for the negative prompt follows
        return fold(sample, batch, shift if forward.rescaled is None else None, None)
