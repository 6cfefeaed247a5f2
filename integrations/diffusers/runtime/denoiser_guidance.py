# SPDX-License-Identifier: Apache-2.0
"""Guidance inside one denoiser: guided layers, places at which branches join, and the recorder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from segkern.core.private_apis import is_compiled_in_place
from segkern.integrations.diffusers.runtime.branches import Batch, Forward, JoinPlan
from segkern.integrations.diffusers.runtime.denoisers import Denoiser
from segkern.integrations.diffusers.runtime.foreign_hooks import HookWatch
from segkern.integrations.diffusers.runtime.guided_layers import GuidedLayer, GuidedLayers
from segkern.integrations.diffusers.runtime.hooks import act_here, hook_grids
from segkern.integrations.diffusers.runtime.origins import Trust, is_trusted, name_of
from segkern.integrations.diffusers.runtime.per_sample import KeptEmbeddings
from segkern.integrations.diffusers.runtime.plans import ForwardPlan, LayerPlan, shaped
from segkern.integrations.diffusers.runtime.recomputation import Recomputation
from segkern.integrations.diffusers.runtime.regions import Regions
from segkern.integrations.diffusers.runtime.report import Recorder
from segkern.integrations.specs import SLG, TPG
from segkern.integrations.specs.base import BlockSpec, LayeredSpec, PlacedSpec

_DID_NOT_RUN = (
    "did not run in a guided step; remove the code that skips it, or call guide again if the layer was replaced"
)
_MOST_PLANS = 64  # maximum number of cached plans; a run needs only a few


class DenoiserGuidance:
    """The parts of a denoiser on which guidance acts.

    Attributes:
        layers: Layers that are perturbed or read.
        first: For every spec, the place at which its branch joins.
        recorder: Records the effects on the layers.
        trust: Code that the user trusts; it may skip layers in a step.
        recomputation: Repeats parts of the denoiser under gradient checkpointing.
    """

    def __init__(self, denoiser: Denoiser, placed: tuple[PlacedSpec, ...], trust: Trust = ()) -> None:
        self._denoiser = denoiser
        self._places = denoiser.places
        self._inner: list[RemovableHandle] = []  # hooks on the parts while attached
        self.recorder = Recorder(placed)
        self.trust = trust
        self.layers = GuidedLayers(denoiser, placed)
        self.first = [self._place(placed_spec) for placed_spec in placed]
        places = [place for place in self.first if place >= 0]
        self._specs = [placed_spec.spec for placed_spec in placed]
        self._joins = self._places.joins()
        # Layers of specs that change blocks, by the index of the spec and the place of the block.
        self._layer_of = {
            (index, self._places.of(layer.module)): layer
            for index, placed_spec in enumerate(placed)
            if isinstance(placed_spec.spec, BlockSpec)
            for layer in placed_spec.layers
        }
        blocks = {place: self._places.block(place) for _, place in self._layer_of}
        self._blocks = {place: block for place, block in blocks.items() if block is not None}
        hooked = [*(self._places.joins_for(places) if places else []), *self._blocks.values()]
        self._hooked = list(dict.fromkeys(hooked))
        self.recomputation = Recomputation(denoiser.model, self.layers, self._hooked)
        self._regions = Regions(denoiser.model, self.layers, self._hooked)
        self._plans: dict[Any, ForwardPlan] = {}
        self._kept = KeptEmbeddings(denoiser.model)

    def _place(self, placed_spec: PlacedSpec) -> int:
        """Return the place of the first perturbed layer; -1 (before all places) if the whole input differs."""
        modules = [layer.module for layer in placed_spec.layers if isinstance(placed_spec.spec, LayeredSpec)]
        return min((self._places.of(module) for module in modules), default=-1)

    def attach(self, watches: Iterable[HookWatch] = ()) -> None:
        """Register hooks on the denoiser's parts, and replace the layers' current processors.

        Args:
            watches: Watches of users' hooks.
        """
        self.layers.stand_in()
        self._regions.attach()
        if self.recomputation.compiled or is_compiled_in_place(self._denoiser.model):
            for block in self._blocks.values():
                block.mark()
        if not self._inner:
            self._inner += [handle for watch in watches for handle in watch.register()]
            modules = [layer.info.module for layer in self.layers]
            self._inner += hook_grids(self._denoiser.model, modules, self.layers.set_grid)
            self._inner += [handle for join in self._hooked for handle in join.hooks()]
        self.recomputation.attach()

    def detach(self) -> None:
        """Restore the denoiser's parts, so that unguided calls run none of segkern's code, compiled or not."""
        act_here(False)
        self._regions.detach()
        for block in self._blocks.values():
            block.unmark()
        self.recomputation.detach()
        self._rest_joins()
        self._kept.restore()
        while self._inner:
            self._inner.pop().remove()
        self.layers.step_aside()

    def tell(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare each part for the next denoiser call, which gets these arguments."""
        grid = self._denoiser.grid(args, kwargs)
        if grid is not None:
            sizes = shaped(grid)
            for layer in self.layers:
                layer.processor.grid, layer.processor.sizes = grid, sizes
        plan = self._plan(forward)
        self._kept.grow(forward.batch, forward.joined(-1))
        self._tell_joins(self._with_orders(plan.joins, forward, args, kwargs))
        self.layers.tell(_with_starts(plan.layers, forward.batch, self._denoiser.starts(args, kwargs)))
        self.recomputation.begin()
        act_here(True)

    def _plan(self, forward: Forward) -> ForwardPlan:
        """Return the plan of a call. Calls with equal inputs share a plan."""
        samples = (forward.reference.start, forward.reference.stop)
        key = (forward.batch, forward.branches, forward.share, forward.frames, forward.sag, samples, forward.changed)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = ForwardPlan(self.layers.plans(forward), self._join_plans(forward))
        return plan

    def _join_plans(self, forward: Forward) -> tuple[JoinPlan | None, ...]:
        """Return the plan of each join, without the orders of shuffled tokens."""
        counts = [forward.joined(place) for place in range(len(self._places))]
        plans: list[JoinPlan | None] = [None] * len(self._joins)
        if forward.share and forward.branches:
            plans = list(self._places.plan(forward.inside, counts))
        for place, block in self._blocks.items():
            branches = [
                (branch, index) for branch, index in enumerate(forward.branches) if (index, place) in forward.changed
            ]
            if branches:
                skipped = tuple(branch for branch, index in branches if isinstance(self._specs[index], SLG))
                shuffled = tuple(branch for branch, _ in branches if branch not in skipped)
                plans[self._joins.index(block)] = JoinPlan(forward.inside, (counts[place],), skipped, shuffled)
        return tuple(plans)

    def _with_orders(
        self, plans: Sequence[JoinPlan | None], forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[JoinPlan | None]:
        """Return the plans of the joins with the orders of shuffled tokens in a call."""
        result = list(plans)
        for place, block in self._blocks.items():
            at = self._joins.index(block)
            plan = result[at]
            if plan is None or not plan.shuffled:
                continue
            orders: list[torch.Tensor] = []
            starts: Sequence[int] = ()
            for branch in plan.shuffled:
                index = forward.branches[branch]
                spec, layer = self._specs[index], self._layer_of[index, place]
                assert isinstance(spec, TPG)
                tokens, start = self._denoiser.tokens(layer.module, args, kwargs)
                device = self._denoiser.sample(args, kwargs).device
                orders.append(spec.order(forward.step, layer.name, tokens).to(device))
                starts = [start] * plan.batch.samples if isinstance(start, int) else start[plan.batch.conditional]
            result[at] = replace(plan, orders=tuple(orders), starts=tuple(starts))
        return result

    def changed(self, index: int, step: int) -> tuple[int, ...]:
        """Return the places of the blocks that a spec changes in a step."""
        spec = self._specs[index]
        if not isinstance(spec, BlockSpec):
            return ()
        names = {layer.name: place for (of, place), layer in self._layer_of.items() if of == index}
        return tuple(names[name] for name in spec.chosen(step, list(names)))

    def forget(self) -> None:
        """Free the results of the last call."""
        self.layers.forget()
        for block in self._blocks.values():
            block.moved = {}

    def _tell_joins(self, plans: Sequence[JoinPlan | None]) -> None:
        """Set the plan of each join for the next call; None for modules that run unchanged."""
        for join, plan in zip(self._joins, plans, strict=True):
            join.plan = plan

    def _rest_joins(self) -> None:
        """Make all modules run unchanged."""
        for join in self._joins:
            join.plan = None

    def reports(self, forward: Forward) -> dict[tuple[int, str], torch.Tensor]:
        """Return how far each spec changed the output of each layer that it perturbed, as norms.

        Raises:
            RuntimeError: If a spec should have acted on a layer but did not.
        """
        self.recorder.kernels |= self.layers.kernels
        moved: dict[tuple[int, str], torch.Tensor] = {}
        for layer in self.layers:
            processor, name = layer.processor, layer.info.module
            acting = [index for index in forward.branches if index in layer.specs]
            read = any(index in forward.sag for index in layer.readers)
            if (acting and processor.moved is None) or (read and processor.mass is None):
                if layer.attention.processor is processor and self._may_skip(layer.info.module):
                    continue
                raise RuntimeError(_left_out(layer))
            for index, distance in zip(acting, processor.moved or (), strict=True):
                moved[index, name] = distance
        for index, place in forward.changed:
            info, norms = self._layer_of[index, place], self._blocks[place].moved.get(forward.branches.index(index))
            if norms is not None:
                moved[index, info.module] = norms
            elif not self._may_skip(info.module):
                raise RuntimeError(f"the block of layer {info.name} ({info.module}) {_DID_NOT_RUN}")
        return moved

    def _may_skip(self, name: str) -> bool:
        """Return True if code that the user trusts runs around a layer."""
        parts = name.split(".")
        around = [self._denoiser.model.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
        return any(
            is_trusted(module, self.trust) or is_trusted(vars(module).get("forward"), self.trust) for module in around
        )

    @contextmanager
    def quiet(self, forward: Forward) -> Iterator[None]:
        """Let the denoiser run unguided inside this context, on the samples that SAG degrades."""
        own = forward.reference.stop <= forward.batch.size
        self.recomputation.end()
        self._rest_joins()
        self.layers.rest()
        self._kept.take(forward.batch, forward.reference if own else forward.batch.conditional)
        try:
            yield
        finally:
            self._kept.restore()


def _with_starts(plans: Sequence[LayerPlan], batch: Batch, starts: tuple[int, ...]) -> Sequence[LayerPlan]:
    """Return the plans of layers with the first image token of each sample, if the samples of a batch differ."""
    if not starts:
        return plans
    counts = [(len(plan.sigmas) - batch.size) // batch.samples for plan in plans]
    return [
        replace(plan, starts=starts + starts[batch.conditional] * count)
        for plan, count in zip(plans, counts, strict=True)
    ]


def _left_out(layer: GuidedLayer) -> str:
    """Return the message for a layer on which guidance should have acted in the last call."""
    at, now = f"layer {layer.info.name} ({layer.info.module})", layer.attention.processor
    if now is layer.processor:
        return f"{at} {_DID_NOT_RUN}"
    return (
        f"the processor of {at} was replaced by a {name_of(type(now))} during a denoiser call, so guidance did not act "
        f"on it; change processors (attention slicing, xFormers, IP-Adapters) between steps, as in callback_on_step_end"
    )
