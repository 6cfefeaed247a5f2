# SPDX-License-Identifier: Apache-2.0
"""Guidance with regional compilation, in which blocks are compiled one by one, as ``compile_repeated_blocks`` does.

``torch.compile`` counts the graphs per function, which all blocks of a class share, and treats every number on a module
as a constant. Different kinds of perturbed blocks would reach the recompile limit after a few image sizes. During a
guided call, each kind of compiled block is therefore run by its own copy of a function that gets the plan as an
argument, so the plan's numbers may change between calls. Hooks at which branches join stay outside the graphs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from segkern.core.private_apis import is_compiled_in_place
from segkern.grid import Grid
from segkern.integrations.diffusers.runtime.branches import Join, JoinPlan
from segkern.integrations.diffusers.runtime.guided_layers import GuidedLayer, GuidedLayers
from segkern.integrations.diffusers.runtime.hooks import acts_here
from segkern.integrations.diffusers.runtime.plans import LayerPlan
from segkern.integrations.diffusers.runtime.processor import GuidedProcessor

LayerPart = tuple[GuidedProcessor, LayerPlan | None, Grid | None]
JoinPart = tuple[Join, JoinPlan | None]


class Regions:
    """The compiled blocks of one denoiser in which guidance acts or whose batch includes branches.

    Args:
        model: The denoiser.
        layers: The guided layers.
        joins: Hooks that are registered during a guided call.
    """

    def __init__(self, model: nn.Module, layers: GuidedLayers, joins: Sequence[Join]) -> None:
        self._model = model
        names = {id(module): name for name, module in model.named_modules()}
        self._layers = [(layer.info.module, layer) for layer in layers]
        self._joins = [(names[id(join.module)], join) for join in joins]
        inside = dict.fromkeys(around for name, _ in (*self._layers, *self._joins) for around in _around(name))
        self._candidates = [(name, model.get_submodule(name)) for name in inside]
        self._compiled: list[str] = []
        self._regions: list[_Region] = []
        self._attached: list[_Region] = []

    def attach(self) -> None:
        """Run the blocks that are compiled now as regions, unless the denoiser is compiled as a whole."""
        compiled = [name for name, module in self._candidates if is_compiled_in_place(module)]
        if compiled and is_compiled_in_place(self._model):
            compiled = []
        if compiled != self._compiled:
            self._compiled = compiled
            outermost = [name for name in compiled if not any(around in compiled for around in _around(name)[:-1])]
            self._regions = [self._region(name) for name in outermost]
            for name, join in self._joins:
                join.outside = name in outermost
        for region in self._regions:
            if "forward" not in vars(region.module):
                region.module.forward = region
                self._attached.append(region)

    def detach(self) -> None:
        """Restore the blocks."""
        while self._attached:
            module = self._attached.pop().module
            if isinstance(vars(module).get("forward"), _Region):
                del module.forward

    def _region(self, name: str) -> _Region:
        layers = [layer for module, layer in self._layers if name in _around(module)]
        joins = [join for module, join in self._joins if name in _around(module)]
        return _Region(self._model.get_submodule(name), layers, joins)


def _around(name: str) -> list[str]:
    """Return the names of the modules that contain a module, from the outermost, and its own name."""
    return list(itertools.accumulate(name.split("."), "{}.{}".format))


class _Region:
    """Replaces the forward of one compiled block.

    Args:
        module: The block.
        layers: The guided layers in it.
        joins: The joins on it and inside it.
    """

    def __init__(self, module: Any, layers: Sequence[GuidedLayer], joins: Sequence[Join]) -> None:
        self.module = module
        self._layers = layers
        self._joins = joins

    def __reduce__(self) -> tuple[Any, ...]:
        """Restore the class's forward in a copy of the block."""
        return functools.partial, (type(self.module).forward, self.module)

    @functools.partial(torch.compiler.disable, recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function, layers, joins = self._prepare()
        if function is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return function(self.module, type(self.module).forward, layers, joins, args, kwargs)

    @torch.compiler.disable
    def _prepare(self) -> tuple[Callable[..., Any] | None, list[LayerPart], list[JoinPart]]:
        """Return the function to run and its arguments; None if the block runs unchanged on the pipeline's batch."""
        if not acts_here():
            return None, [], []
        layers = [(layer.processor, layer.processor.plan, layer.processor.grid) for layer in self._layers]
        joins = [(join, join.plan) for join in self._joins]
        plans = tuple(None if plan is None else plan.kind for _, plan, _ in layers)
        joined = tuple(plan for _, plan in joins)
        block: Any = type(self.module)
        plain = not any(plans) and not any(plan is not None and any(plan.branches) for plan in joined)
        return None if plain else _function(block, plans, joined), layers, joins


def _run(
    module: Any,
    forward: Callable[..., Any],
    layers: Sequence[LayerPart],
    joins: Sequence[JoinPart],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a block's forward with the plans and grids of its layers taken from arguments."""
    for processor, plan, grid in layers:
        processor.plan, processor.grid, processor.sizes = plan, grid, None
    for join, told in joins:
        join.plan = told
    return forward(module, *args, **kwargs)


_numbers = itertools.count(1)


@functools.lru_cache(maxsize=256)
def _function(block: type, plans: tuple[Any, ...], joins: tuple[JoinPlan | None, ...]) -> Callable[..., Any]:
    """Return a copy of :func:`_run` for one kind of block, whose graphs are counted separately."""
    code = _run.__code__.replace(co_name=f"guided_{block.__name__}_{next(_numbers)}")
    return FunctionType(code, _run.__globals__, code.co_name)
