# SPDX-License-Identifier: Apache-2.0
"""``guide``: guidance on a stock pipeline, through hooks that come off again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.grid import Grid
from segkern.integrations.diffusers.attention import EVERY_ROW
from segkern.integrations.diffusers.branches import Arguments, Batch, DenoiserArguments, difference, fold
from segkern.integrations.diffusers.calibration import Calibration
from segkern.integrations.diffusers.layers import LayerInfo
from segkern.integrations.diffusers.processor import STANDARD_PROCESSORS, GuidedProcessor, unwrap
from segkern.integrations.diffusers.report import Recorder, Report
from segkern.integrations.diffusers.reuse import Differences
from segkern.integrations.diffusers.schedule import Run
from segkern.integrations.diffusers.sharing import Places
from segkern.integrations.diffusers.specs import SEG
from segkern.integrations.diffusers.support import GUIDED, check_pipeline, choose_layers


def guide(pipe: Any, *specs: SEG, share: bool = True) -> Guidance:
    """Turn on guidance for every run of a pipeline, until the context is left or ``remove()`` is called.

    The pipeline stays the stock one, whatever its task (text to image, image to image, inpainting,
    ControlNet, T2I-Adapter, IP-Adapter, LoRA): hooks on its denoiser append one perturbed branch for each
    spec, compute the guided prediction and hand it back in the shape the pipeline expects. The pipeline's own
    arguments mean what they always meant. Specs combine: ``u + g (c - u) + sum_i s_i (c - p_i)``, and a layer
    may belong to several. Guidance belongs to the pipeline: another one that shares its ``unet`` runs unguided.

    Args:
        pipe: a Stable Diffusion or Stable Diffusion XL pipeline. Its ``unet`` may be compiled.
        specs: the guidances, at least one.
        share: let a branch join the batch only at the transformer block of its first layer, since it equals the
            conditional branch before; that layer projects the branch's queries, keys and values once for both.
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
    unet = check_pipeline(pipe)
    layers = choose_layers(unet, specs)
    guidance = Guidance(pipe, unet, specs, layers, share)
    guidance._install()
    return guidance


@dataclass
class _Layer:
    """A guided layer and what stands in it."""

    info: LayerInfo
    attention: Attention
    processor: GuidedProcessor
    specs: tuple[int, ...]  # the guidances that act on it


class Guidance:
    """Guidance at work on a pipeline; made by :func:`guide`."""

    def __init__(
        self,
        pipe: Any,
        unet: UNet2DConditionModel,
        specs: tuple[SEG, ...],
        layers: tuple[list[LayerInfo], ...],
        share: bool,
    ) -> None:
        self._pipe = pipe
        self._denoiser: nn.Module = pipe.unet  # torch.compile's wrapper, if there is one: bookkeeping stays outside
        self._unet = unet
        self._specs = specs
        self._share = share
        self._run = Run(pipe)
        self._calibration = Calibration(specs)
        self._recorder = Recorder(specs, layers, self._calibration)
        self._arguments = DenoiserArguments(unet)
        self._installed = False
        self._handles: list[RemovableHandle] = []  # on the denoiser, for as long as it is guided
        self._inner: list[RemovableHandle] = []  # on its parts, from the first guided forward to the next plain one
        self._places = Places(unet)
        self._layers = _guided_layers(unet, specs, layers)
        # Where each guidance's branch joins.
        self._first = [min(self._places.of(layer.module) for layer in chosen) for chosen in layers]
        self._batch: Batch | None = None  # of the forward under way; None when it is a plain one
        self._active: tuple[int, ...] = ()  # guidances of the forward under way, in the order in which they join
        self._reused: tuple[int, ...] = ()  # those of it whose last difference is taken instead
        self._differences = Differences(specs)

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
            GUIDED.add(self._unet)
            self._attach()
            self._handles.append(self._denoiser.register_forward_pre_hook(self._before, with_kwargs=True))
            # Other forward hooks get the prediction the pipeline gets, so this one comes first.
            self._handles.append(self._denoiser.register_forward_hook(self._after, prepend=True))
        except BaseException:
            self._remove(warn=False)
            raise

    def _attach(self) -> None:
        """Hook the denoiser's parts, and stand in for the layers' processors, whichever they are by now."""
        for layer in self._layers:
            current = layer.attention.processor
            if current is layer.processor:
                continue
            original = unwrap(current)
            if type(original) not in STANDARD_PROCESSORS:
                raise ValueError(
                    f"layer {layer.info.module!r} was given a {type(original).__name__} while guided, which "
                    f"is not standard self-attention; set it after the guidance is removed"
                )
            if original is not layer.processor.original:  # fused projections, for example
                layer.processor.tell(None)  # someone may have kept it
                layer.processor = GuidedProcessor(original, layer.processor.boundary, layer.processor.backend)
            layer.attention.set_processor(layer.processor)
        if not self._inner:
            self._hook_grids()
            self._inner += self._places.hook(min(self._first))

    def _detach(self) -> None:
        """Leave the denoiser's parts as they were: a plain forward runs nothing of ours, compiled or not."""
        self._places.tell(None, ())
        while self._inner:
            self._inner.pop().remove()
        for layer in self._layers:
            layer.processor.tell(None)  # someone may have kept it
            if layer.attention.processor is not unwrap(layer.attention.processor):
                layer.attention.set_processor(unwrap(layer.attention.processor))

    def _hook_grids(self) -> None:
        """Each layer's grid comes from the image that its transformer gets."""
        for name, module in self._unet.named_modules():
            if isinstance(module, Transformer2DModel):
                inside = [layer for layer in self._layers if layer.info.module.startswith(f"{name}.")]
                if inside:
                    read = _ReadGrid(module, inside)
                    self._inner.append(module.register_forward_pre_hook(read, with_kwargs=True))

    def _remove(self, warn: bool) -> None:
        if not self._installed:
            return
        self._installed = False
        GUIDED.discard(self._unet)
        had_hooks = bool(self._handles)
        ran = had_hooks and self._recorder.forwards > 0
        while self._handles:
            self._handles.pop().remove()
        self._detach()
        self._differences.forget()
        for layer in self._layers:
            layer.processor.moved, layer.processor.errors = None, ()
        saved = getattr(self._unet, "original_attn_processors", None)  # what unfuse_qkv_projections will put back
        if isinstance(saved, dict):
            saved.update({name: unwrap(processor) for name, processor in saved.items()})
        if warn and not ran and had_hooks and self._pipe.unet is not self._denoiser:
            warnings.warn(
                f"guidance did nothing: this {type(self._pipe).__name__} was given another unet while guided; call "
                f"guide after replacing it",
                UserWarning,
                stacklevel=3,
            )
        if ran and warn:
            self._recorder.warn(self._recorder.report(), stacklevel=4)

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Before the denoiser: decide what this forward does and tell the blocks and layers."""
        if module is not self._denoiser:  # a copy is not guided
            return None
        self._batch = None
        if not self._run.is_ours():
            self._detach()
            return None
        step = self._run.next_step()
        if step.call == 0:  # a new run, whether a guidance acts at its beginning or not
            self._differences.forget()
        acting = [index for index, spec in enumerate(self._specs) if spec.active(step.fraction)]
        sample = self._arguments.get("sample", args, kwargs)
        active = [index for index in acting if self._differences.due(index, step.number, sample.shape)]
        if active:
            self._attach()
        self._recorder.forwards += 1
        self._active = tuple(sorted(active, key=lambda index: self._first[index]))
        self._reused = tuple(index for index in acting if index not in active)
        if acting and not active:
            self._batch = self._run.batch(sample.shape[0], 0)
        if not active:
            self._detach()
            return None
        self._batch = self._run.batch(sample.shape[0], len(active))
        self._calibration.size = (sample.shape[2], sample.shape[3])
        share = self._share and self._can_share(args, kwargs)
        self._tell(self._batch, share)
        if not share:
            return self._arguments.grow_all(args, kwargs, self._batch, len(active))
        mid = self._joined(self._places.last_of("mid"))
        return self._arguments.grow_mid_residual(args, kwargs, self._batch, mid) if mid else None

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the denoiser: fold the branches back and take down what the layers report."""
        if self._batch is None or module is not self._denoiser:
            return None
        sample = output[0]
        moved: dict[tuple[int, str], torch.Tensor] = {}
        for layer in self._layers:
            processor, name = layer.processor, layer.info.module
            acting = [index for index in self._active if index in layer.specs]
            for index, norms in zip(acting, processor.moved or (), strict=False):
                moved[index, name] = norms
            estimated = [index for index in acting if self._calibration.candidates(index, name)]
            for index, errors in zip(estimated, processor.errors, strict=False):
                assert processor.grid is not None
                self._calibration.add(index, name, processor.grid, errors)
            processor.moved, processor.errors = None, ()
        self._calibration.settle()
        self._recorder.add(moved, sample.dtype)
        guided = []
        for branch, index in enumerate(self._active):
            found = difference(sample, self._batch, branch)
            self._differences.keep(index, found)
            guided.append((self._specs[index].scale, found))
        guided += [(self._specs[index].scale, self._differences.last(index)) for index in self._reused]
        rescaled = self._run.rescaled_guidance_scale() if self._batch.first else None
        folded = fold(sample, self._batch, guided, rescaled)
        return (folded, *output[1:]) if isinstance(output, tuple) else type(output)(sample=folded)

    def _can_share(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether residuals from outside meet tensors of the batch they were made for.

        A T2I-Adapter's are added inside down blocks and to the mid block's output; a ControlNet's after all
        down blocks, to skip connections that are larger already if a branch has joined by then.
        """
        down = self._arguments.get("down_block_additional_residuals", args, kwargs)
        mid = self._arguments.get("mid_block_additional_residual", args, kwargs)
        inside = self._arguments.get("down_intrablock_additional_residuals", args, kwargs)
        if inside is not None or (down is not None and mid is None):  # the second is the old way to pass the first
            return False
        return down is None or self._joined(self._places.last_of("down")) == 0

    def _joined(self, place: int) -> int:
        """How many of the active guidances' branches run through the place of this number."""
        return sum(self._first[index] <= place for index in self._active)

    def _tell(self, batch: Batch, share: bool) -> None:
        self._places.tell(batch if share else None, [self._joined(place) for place in range(len(self._places))])
        for layer in self._layers:
            place = self._places.of(layer.info.module)
            joined = self._joined(place) if share else len(self._active)
            new = joined - self._joined(place - 1) if share and self._places.shares_inputs(place) else 0
            sigmas, strides = [0.0] * batch.size, [EVERY_ROW] * batch.size
            for index in self._active[:joined]:
                acts, samples = index in layer.specs, batch.size - batch.first
                sigmas += [self._specs[index].sigma if acts else 0.0] * samples
                strides += [self._calibration.stride(index, layer.info.module) if acts else EVERY_ROW] * samples
            acting = [(i, index) for i, index in enumerate(self._active) if index in layer.specs]
            processor = layer.processor
            processor.tell(tuple(float(sigma) for sigma in sigmas))
            processor.strides = tuple(strides)
            processor.conditional = batch.conditional
            processor.own = batch.with_branches(joined - new)
            processor.perturbed = tuple(batch.branch(i) for i, _ in acting)
            processor.candidates = tuple(self._calibration.candidates(index, layer.info.module) for _, index in acting)
            processor.errors = ()


class _ReadGrid:
    """Forward pre-hook of a transformer: the height and width of its image are its layers' grid."""

    def __init__(self, transformer: nn.Module, layers: list[_Layer]) -> None:
        self._transformer = transformer
        self._layers = layers

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadGrid:
        return self

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._transformer:  # a copy is not guided
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        height, width = hidden_states.shape[2:]
        for layer in self._layers:
            if layer.processor.kinds:
                layer.processor.grid = Grid(height, width)


def _guided_layers(
    unet: UNet2DConditionModel, specs: tuple[SEG, ...], chosen: tuple[list[LayerInfo], ...]
) -> list[_Layer]:
    layers: dict[str, _Layer] = {}
    for index, (spec, infos) in enumerate(zip(specs, chosen, strict=True)):
        for info in infos:
            attention = unet.get_submodule(info.module)
            assert isinstance(attention, Attention)
            processor = GuidedProcessor(unwrap(attention.processor), spec.boundary, spec.backend)
            layer = layers.setdefault(info.module, _Layer(info, attention, processor, ()))
            layer.specs = (*layer.specs, index)
    return list(layers.values())
