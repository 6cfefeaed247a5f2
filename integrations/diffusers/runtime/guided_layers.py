# SPDX-License-Identifier: Apache-2.0
"""The guided layers of a denoiser, their replacement processors, and the plan of each layer in a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from segkern.core.coarse_queries import check_query_stride
from segkern.grid import Grid
from segkern.integrations.diffusers.runtime.branches import Forward
from segkern.integrations.diffusers.runtime.denoisers import Denoiser
from segkern.integrations.diffusers.runtime.hooks import acts_here
from segkern.integrations.diffusers.runtime.kernels import NativeAttention, chosen_kernel
from segkern.integrations.diffusers.runtime.plans import LayerPlan
from segkern.integrations.diffusers.runtime.processor import GuidedProcessor, unwrap
from segkern.integrations.diffusers.runtime.query_rows import EVERY_TOKEN, Stride
from segkern.integrations.specs import SLG
from segkern.integrations.specs.base import AttentionSpec, BlockSpec, PlacedSpec
from segkern.integrations.specs.layer_names import LayerInfo
from segkern.integrations.specs.sigmas import Perturbation, Perturbed, per_sample


@dataclass
class GuidedLayer:
    """A guided layer.

    Attributes:
        info: Name and other information.
        attention: The attention module.
        processor: The processor that guidance sets.
        specs: Indices of the specs that perturb the layer.
        readers: Indices of the specs that read how much attention its tokens receive.
    """

    info: LayerInfo
    attention: Any
    processor: GuidedProcessor
    specs: tuple[int, ...] = ()
    readers: tuple[int, ...] = ()


class GuidedLayers:
    """All guided layers of a denoiser, without duplicates.

    Attributes:
        kernels: Attention kernels that the user chose, by module name.
    """

    def __init__(self, denoiser: Denoiser, placed: Sequence[PlacedSpec]) -> None:
        self._denoiser = denoiser
        self._placed = placed
        self._places = denoiser.places
        self._layers: dict[str, GuidedLayer] = {}
        self.kernels: dict[str, str] = {}
        self._native = NativeAttention()
        for index, placed_spec in enumerate(placed):
            if isinstance(placed_spec.spec, BlockSpec):
                continue
            for info in placed_spec.layers:
                layer = self._layers.get(info.module)
                if layer is None:
                    attention: Any = denoiser.model.get_submodule(info.module)
                    processor = denoiser.stand_in(unwrap(attention.processor), *self._blur_of(info.module))
                    layer = self._layers[info.module] = GuidedLayer(info, attention, processor)
                if isinstance(placed_spec.spec, AttentionSpec):
                    layer.specs = (*layer.specs, index)
                else:
                    layer.readers = (*layer.readers, index)

    def __iter__(self) -> Iterator[GuidedLayer]:
        return iter(self._layers.values())

    def _blur_of(self, module: str) -> tuple[str, str]:
        """Return the boundary and the backend that the specs of a layer require; defaults if they have none."""
        for placed_spec in self._placed:
            spec = placed_spec.spec
            if isinstance(spec, AttentionSpec) and spec.boundary is not None and module in placed_spec.sigmas:
                return spec.boundary, spec.backend or "auto"
        return "reflect", "auto"

    def stand_in(self) -> None:
        """Replace the layers' current processors.

        Raises:
            ValueError: If a layer now has a processor that is not standard.
        """
        for layer in self:
            self._stand_in(layer)
        chosen = [(layer, chosen_kernel(layer.processor.original)) for layer in self]  # layers may share processors
        for layer, kernel in chosen:
            if kernel is not None:
                self.kernels[layer.info.module] = kernel
                self._native.take(layer.processor.original)

    def _stand_in(self, layer: GuidedLayer) -> None:
        current = layer.attention.processor
        if current is layer.processor:
            return
        original, old = unwrap(current), layer.processor
        if original is not old.original:  # for example, fused projections
            try:
                new = self._denoiser.stand_in(original, old.boundary, old.backend)
            except ValueError as error:
                raise ValueError(
                    f"the processor of layer {layer.info.module!r} was replaced while guided: {error}; set it after "
                    f"the guidance is removed"
                ) from None
            new.plan, old.plan = old.plan, None  # someone may keep a reference to the old processor
            layer.processor = new
        layer.attention.set_processor(layer.processor)

    def step_aside(self) -> None:
        """Restore the layers' own processors."""
        self.rest()
        self._native.put_back()
        for layer in self:
            if layer.attention.processor is not unwrap(layer.attention.processor):
                layer.attention.set_processor(unwrap(layer.attention.processor))

    def rest(self) -> None:
        """Make all layers run their own processors."""
        for layer in self:
            layer.processor.plan = None  # someone may keep a reference to the processor

    def forget(self) -> None:
        """Free the results of the last call."""
        for layer in self:
            layer.processor.moved, layer.processor.mass = None, None

    def set_grid(self, module: str, grid: Grid) -> None:
        """Set a layer's grid in the current call, if guidance is active in it.

        If a user's hook has replaced the processor since the call began, the new processor is replaced too.
        """
        layer = self._layers[module]
        if layer.processor.plan is not None and acts_here():
            if layer.attention.processor is not layer.processor:
                self._stand_in(layer)
            layer.processor.grid = grid

    def plans(self, forward: Forward) -> tuple[LayerPlan, ...]:
        """Return the plan of each layer in a call."""
        return tuple(self._plan(layer, forward) for layer in self)

    def tell(self, plans: Sequence[LayerPlan]) -> None:
        """Set the plan of each layer for the next call."""
        for layer, plan in zip(self, plans, strict=True):
            layer.processor.plan = plan

    def _plan(self, layer: GuidedLayer, forward: Forward) -> LayerPlan:
        batch, module = forward.inside, layer.info.module
        place = self._places.of(module)
        changes = forward.changes_at(place)
        present = [
            index
            for index in forward.branches[: forward.joined(place)]
            if not (index in changes and isinstance(self._placed[index].spec, SLG))
        ]
        # Branches that join here still equal the conditional branch, unless the block's own inputs are changed.
        shares = forward.share and self._places.shares_inputs(place) and not changes
        new = forward.joined(place) - forward.joined(place - 1) if shares else 0
        plain: tuple[Perturbed, Stride, float] = (0.0, EVERY_TOKEN, 1.0)
        samples = [plain] * batch.size  # sigma, stride and blend
        for index in present:
            spec = self._placed[index].spec
            if index not in layer.specs:
                samples += [plain] * batch.samples
                continue
            assert isinstance(spec, AttentionSpec)
            of_layer = self._placed[index].sigmas.get(module)
            if of_layer is None:
                sigmas: Sequence[Perturbed] = [Perturbation.IDENTITY] * forward.batch.samples
            else:
                sigmas = per_sample(type(spec).__name__, of_layer, forward.batch.samples)
            stride, blend = check_query_stride(spec.query_stride), float(spec.blend)
            samples += [(sigma, stride, blend) for sigma in sigmas for _ in range(forward.frames)]
        sigmas, strides, blends = zip(*samples, strict=True)
        return LayerPlan(
            sigmas,
            strides,
            blends,
            conditional=batch.conditional,
            own=batch.with_branches(len(present) - new),
            perturbed=tuple(batch.branch(i) for i, index in enumerate(present) if index in layer.specs),
            read=forward.reference if any(index in forward.sag for index in layer.readers) else None,
        )
