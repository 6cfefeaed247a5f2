# SPDX-License-Identifier: Apache-2.0
"""``record_energy``: record the energy of a pipeline's self-attention during a run, without changing its images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.analysis.energy import OverSigma, over_sigma
from segkern.core.gaussian import check_boundary
from segkern.core.private_apis import is_compiled_in_place
from segkern.core.sigmas import check_sigma
from segkern.grid import Grid
from segkern.integrations.diffusers.models.layers import LayerInfo, find_unet, list_layers, select_layers
from segkern.integrations.diffusers.runtime.attention import tokens_of
from segkern.integrations.diffusers.runtime.branches import DenoiserArguments
from segkern.integrations.diffusers.runtime.hooks import Hook, hook_grids
from segkern.integrations.diffusers.runtime.layout import BatchLayout, CallKind
from segkern.integrations.diffusers.runtime.pipeline_class import unwatch, watch
from segkern.integrations.diffusers.runtime.pipeline_run import PipelineRun, current_run, in_repeated_forward
from segkern.integrations.diffusers.runtime.projections import Projections
from segkern.integrations.diffusers.runtime.steps import steps_of
from segkern.integrations.diffusers.runtime.support import check_layer


@dataclass(frozen=True)
class LayerEnergy:
    """The energy of one layer in one denoiser call, on the CPU.

    The batch contains only the unperturbed conditional samples. For the two cuts of the logits, see
    :mod:`segkern.energy`.

    Attributes:
        layer: The layer, with its grid in this call.
        run: Number of the pipeline run, from 0.
        step: Number of the denoiser call in the run, from 0.
        steps: Number of denoiser calls in the run.
        by_query: One energy per query, ``over="keys"``. The first sigma is 0; steps that were not selected have no
            other sigmas.
        by_key: One energy per key, ``over="queries"``, as defined in the paper; None in steps that were not selected.
    """

    layer: LayerInfo
    run: int
    step: int
    steps: int
    by_query: OverSigma
    by_key: OverSigma | None

    def map(self, sigma: float = 0.0, *, cut: str = "by_query") -> torch.Tensor:
        """Return the energies over the grid at one sigma, ``[samples, heads, height, width]``, in nats.

        Raises:
            ValueError: If the sigma or the cut was not recorded in this step.
        """
        if cut not in ("by_query", "by_key"):
            raise ValueError(f"cut must be 'by_query' or 'by_key', got {cut!r}")
        energies: OverSigma | None = getattr(self, cut)
        known = () if energies is None else energies.sigmas
        if energies is None or sigma not in known:
            raise ValueError(f"step {self.step} has {cut} energies for sigmas {known}, got {sigma}")
        assert self.layer.grid is not None
        size = (self.layer.grid.height, self.layer.grid.width)
        return energies.energies[known.index(sigma)].unflatten(-1, size)


def record_energy(
    pipe: Any,
    layers: str | Iterable[str] | None = None,
    sigmas: Sequence[float] = (),
    at_steps: Iterable[int] | None = None,
    *,
    boundary: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> EnergyRecorder:
    """Record the energy of self-attention in every run of a pipeline, until the context exits.

    The recorded queries and keys are the inputs of attention in the conditional branch, after projections and norms,
    even while :func:`~segkern.integrations.diffusers.guide` is active on the pipeline. They are computed by separate
    projections, so images stay bit-for-bit the same. Every step records the energy without a blur, and selected steps
    record all sigmas.

    Args:
        pipe: A Stable Diffusion or Stable Diffusion XL pipeline that is not compiled.
        layers: Layers to record, in the form that :class:`~segkern.integrations.diffusers.SEG` accepts. None records
            every self-attention layer.
        sigmas: Standard deviations of the blurs, in tokens; ``math.inf`` is the mean query.
        at_steps: Steps in which all sigmas are recorded: numbers of denoiser calls from 0; negative numbers count from
            the end of a run. None selects every step. For each sigma, recording one layer in one step takes a few times
            as long as its attention and stores ``2 * heads * tokens`` numbers.
        boundary: Boundary of the blurs.
        dtype: Dtype of the analysis, ``torch.float32`` or ``torch.float64``.

    Returns:
        The recorder, a context manager. Its ``records`` remain after exit. On exit, also after an exception, it removes
        all hooks, and it warns if a selected step did not occur.

    Raises:
        ValueError: If a pipeline, layer or number is not supported. The message quotes it, and the pipeline is
            unchanged.

    Source: SEG (arXiv 2408.00760), Definition 2.1 and appendix B.

    Example:
        >>> with record_energy(pipe, "mid", sigmas=(1.0, math.inf), at_steps=(0, -1)) as recorder:  # doctest: +SKIP
        ...     image = pipe("a red fox").images[0]
        >>> recorder.records[0].map(math.inf).shape  # doctest: +SKIP
    """
    if not callable(pipe) or not hasattr(pipe, "unet"):
        raise ValueError(f"record_energy needs a pipeline with a UNet2DConditionModel, got {type(pipe).__name__}")
    unet = find_unet(pipe)
    if any(map(is_compiled_in_place, unet.modules())) or pipe.unet is not unet:
        raise ValueError("record_energy needs a denoiser that is not compiled: compiled denoisers may ignore hooks")
    available = list_layers(unet)
    chosen = available if layers is None else select_layers(available, layers)
    for layer in chosen:
        check_layer(unet, layer)
    values = tuple(sigmas)
    values = check_sigma(values, len(values))
    if len({0.0, *values}) != len(values) + (0.0 not in values):
        raise ValueError(f"sigmas must be distinct, got {values}")
    check_boundary(boundary)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    steps = None if at_steps is None else tuple(at_steps)
    if steps is not None and not all(isinstance(step, int) and not isinstance(step, bool) for step in steps):
        raise ValueError(f"at_steps must be whole numbers, got {steps}")
    recorder = EnergyRecorder(pipe, chosen, (0.0, *(value for value in values if value)), steps, boundary, dtype)
    recorder._install(unet)
    return recorder


class EnergyRecorder:
    """Active recorder of a pipeline; created by :func:`record_energy`.

    Attributes:
        layers: Recorded layers.
        sigmas: Sigmas recorded in selected steps; the first is 0, no blur.
        records: Records so far, in execution order.
    """

    def __init__(
        self,
        pipe: Any,
        layers: Sequence[LayerInfo],
        sigmas: tuple[float, ...],
        at_steps: tuple[int, ...] | None,
        boundary: str,
        dtype: torch.dtype,
    ) -> None:
        self.layers = tuple(layers)
        self.sigmas = sigmas
        self.records: list[LayerEnergy] = []
        self._pipe = pipe
        self._denoiser: nn.Module = pipe.unet
        self._unet = find_unet(pipe)
        self._arguments = DenoiserArguments(pipe.unet)
        self._at_steps = at_steps
        self._boundary = boundary
        self._dtype = dtype
        self._handles: list[RemovableHandle] = []
        self._run = -1
        self._last_run: PipelineRun | None = None
        self._layout: BatchLayout | None = None
        self._watches = False
        self._now: tuple[int, int, slice] | None = None  # step, steps and conditional samples of the current call
        self._grids: dict[str, Grid] = {}  # grids of the layers so far in the current call
        self._missed: set[int] = set(at_steps or ())

    def __deepcopy__(self, memo: dict[int, Any]) -> EnergyRecorder:
        """Return this object: a copied pipeline has the hooks too, but they act only on the original."""
        return self

    def __enter__(self) -> EnergyRecorder:
        if not self._handles:
            raise RuntimeError("this recorder has been removed; call record_energy again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
        if kind is None and self._missed:
            steps = max((record.steps for record in self.records), default=0)
            warnings.warn(
                f"record_energy found no steps {sorted(self._missed)}: runs had {steps} steps",
                UserWarning,
                stacklevel=2,
            )

    def remove(self) -> None:
        """Remove all hooks from the pipeline. Does nothing if they have been removed."""
        while self._handles:
            self._handles.pop().remove()
        if self._watches:
            self._watches = False
            unwatch(self._pipe)
        self._now, self._last_run, self._layout = None, None, None
        self._grids.clear()

    def _install(self, unet: nn.Module) -> None:
        try:
            watch(self._pipe)
            self._watches = True
            # This hook runs before those of guidance, which may enlarge the batch.
            self._hook(unet, self._begin, prepend=True)
            self._handles += hook_grids(unet, [layer.module for layer in self.layers], self._grids.__setitem__)
            for layer in self.layers:
                attention = unet.get_submodule(layer.module)
                assert isinstance(attention, Attention)
                self._hook(attention, partial(self._record, attention, layer))
        except BaseException:
            self.remove()
            raise

    def _hook(self, module: nn.Module, see: Callable[..., None], prepend: bool = False) -> None:
        hook = _PreHook(module, see)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend))

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a denoiser call on the pipeline's own batch."""
        self._now = None
        self._grids.clear()
        run = current_run()
        if run is None or run.pipe is not self._pipe or in_repeated_forward():
            return
        if run is not self._last_run:
            self._run += 1
            self._last_run, self._layout = run, BatchLayout(run, type(self._pipe).__name__)
        assert self._layout is not None
        latents, text, timestep = (
            self._arguments.get(name, args, kwargs) for name in ("sample", "encoder_hidden_states", "timestep")
        )
        call = self._layout.of_call(latents, text, timestep)
        if call.kind is CallKind.NEGATIVE:
            return
        step = steps_of(run, self._pipe.scheduler).of_call(self._pipe.scheduler, timestep, float)
        self._now = step.call, step.calls, call.batch.conditional

    def _is_chosen(self, step: int, steps: int) -> bool:
        if self._at_steps is None:
            return True
        names = {step, step - steps} & set(self._at_steps)
        self._missed -= names
        return bool(names)

    @torch.no_grad()
    def _record(self, attention: Attention, layer: LayerInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call of a layer on the batch that its processor gets."""
        if self._now is None:
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        masked = (args[2] if len(args) > 2 else kwargs.get("attention_mask")) is not None
        step, steps, conditional = self._now
        if masked or hidden_states.ndim != 3 or layer.module not in self._grids:
            raise ValueError(
                f"layer {layer.name} ({layer.module}) got {'a mask' if masked else tuple(hidden_states.shape)}, but "
                f"record_energy needs self-attention over all image tokens, [batch, tokens, channels] without a mask"
            )
        grid = self._grids[layer.module]
        tokens = tokens_of(attention, hidden_states[conditional], None)
        query, key = Projections(attention, attention.fused_projections).query_key(tokens)
        scale = float(attention.scale)
        chosen = self._is_chosen(step, steps)

        def over(cut: Any) -> OverSigma:
            sigmas = self.sigmas if chosen else (0.0,)
            energies = over_sigma(
                query, key, grid, sigmas, over=cut, scale=scale, boundary=self._boundary, dtype=self._dtype
            )
            return _on_cpu(energies)

        here = replace(layer, grid=grid)
        self.records.append(
            LayerEnergy(here, self._run, step, steps, over("keys"), over("queries") if chosen else None)
        )


class _PreHook(Hook):
    """A forward pre-hook that only observes its module's arguments. On a copy of the module it does nothing."""

    def __init__(self, module: nn.Module, see: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._module = module
        self._see = see

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self._module:
            self._see(args, kwargs)


def _on_cpu(energies: OverSigma) -> OverSigma:
    moved: dict[str, Any] = {}
    for field in fields(energies):
        value = getattr(energies, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.cpu()
        elif isinstance(value, dict):
            moved[field.name] = {name: x.cpu() for name, x in value.items()}
    return replace(energies, **moved)
