# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks that some branches skip, or whose tokens are shuffled for some branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.core.sigmas import equal_runs
from segkern.integrations.diffusers.runtime.branches import Arguments, Join, JoinPlan, map_tensors
from segkern.integrations.diffusers.runtime.hooks import Hook, Outer, acts_here
from segkern.integrations.diffusers.runtime.processor import norms


class BlockJoin(Join):
    """Hooks of a transformer block at which branches join, and which branches can skip.

    The samples of a skipped branch are removed from the block's arguments, and their inputs are inserted into its
    outputs.

    Args:
        module: The block.
        batched: Arguments of the block with one entry per sample.
        outputs: Arguments that the block returns, in this order.

    Attributes:
        moved: For each changed branch of the last call, by its number: the norms ``[2, samples]`` of the change of the
            block's output and of the output of the conditional branch.
    """

    def __init__(self, module: nn.Module, batched: frozenset[str], outputs: Sequence[str]) -> None:
        super().__init__(module, batched)
        self._outputs = outputs
        self._inputs: list[Any] = []  # the outputs of skipped branches in the current call
        self.moved: dict[int, torch.Tensor] = {}

    def hooks(self) -> list[RemovableHandle]:
        """Register the hooks on the block."""
        end = _End(self)
        return [*super().hooks(), self.module.register_forward_hook(Outer(end) if self.outside else end)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        joined = super().__call__(module, args, kwargs)
        plan = self.plan
        if joined is None or plan is None:
            return joined
        args, kwargs = joined
        if plan.shuffled:
            args, kwargs = self._with_image(args, kwargs, lambda image: _shuffled(image, plan))
        if plan.skipped:
            self._inputs = [self._argument(name, args, kwargs) for name in self._outputs]
            args, kwargs = self._map(args, kwargs, lambda value: map_tensors(value, lambda x: _kept(x, plan)))
        return args, kwargs

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Insert the samples of skipped branches in the block's output, and measure the changes."""
        plan = self.plan if acts_here() else None
        if plan is None or module is not self.module or not (plan.skipped or plan.shuffled):
            return None
        outputs = list(output) if isinstance(output, tuple) else [output]
        if plan.skipped:
            outputs = [_restored(part, given, plan) for part, given in zip(outputs, self._inputs, strict=True)]
            self._inputs = []
        image = outputs[self._outputs.index(self._names[0])]
        conditional = image[plan.batch.conditional]
        reference = norms(conditional)
        self.moved = {
            branch: torch.stack([norms(image[plan.batch.branch(branch)] - conditional), reference])
            for branch in (*plan.skipped, *plan.shuffled)
        }
        return tuple(outputs) if isinstance(output, tuple) else outputs[0]

    def mark(self) -> None:
        """Give the block its own ``forward``, the same function.

        Compiled code that contains the block does not notice new hooks, but it notices a new ``forward``.
        """
        if "forward" not in vars(self.module):
            self.module.forward = MethodType(type(self.module).forward, self.module)

    def unmark(self) -> None:
        """Remove the ``forward`` that ``mark`` set."""
        own = vars(self.module).get("forward")
        if isinstance(own, MethodType) and own.__func__ is type(self.module).forward:
            del self.module.forward

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self._names.index(name)
        return args[position] if position < len(args) else kwargs.get(name)

    def _with_image(self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]) -> Arguments:
        """Return the arguments with ``change`` applied to the first one, the image."""
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = self._names[0]
        return args, kwargs | {name: change(kwargs[name])}


class _End(Hook):
    """Forward hook of a block."""

    def __init__(self, join: BlockJoin) -> None:
        self._join = join

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._join.end(module, args, output)


def _shuffled(image: torch.Tensor, plan: JoinPlan) -> torch.Tensor:
    """Return ``[samples, tokens, channels]`` with the image tokens of some branches in another order."""
    image = image.clone()
    for branch, order in zip(plan.shuffled, plan.orders, strict=True):
        for rows, start in equal_runs(plan.starts):
            samples = image[plan.batch.branch(branch)][rows]
            samples[:, start : start + len(order)] = samples[:, start + order]
    return image


def _runs(plan: JoinPlan) -> list[tuple[slice, bool]]:
    """Return the samples in runs, with whether the block processes them."""
    (count,) = plan.branches
    kept = [(plan.batch.branch(branch), branch not in plan.skipped) for branch in range(count)]
    return [(slice(0, plan.batch.size), True), *kept]


def _kept(x: torch.Tensor, plan: JoinPlan) -> torch.Tensor:
    """Return a tensor without the samples of skipped branches. Tensors that all samples share are unchanged."""
    (count,) = plan.branches
    if not x.ndim or x.shape[0] != plan.batch.with_branches(count):
        return x
    return torch.cat([x[samples] for samples, kept in _runs(plan) if kept])


def _restored(output: Any, given: Any, plan: JoinPlan) -> Any:
    """Return a block's output with the inputs of skipped branches in their places."""
    if not isinstance(output, torch.Tensor):
        return output
    parts, done = [], 0
    for samples, kept in _runs(plan):
        length = samples.stop - samples.start
        parts.append(output[done : done + length] if kept else given[samples].to(output.dtype))
        done += length if kept else 0
    return torch.cat(parts)
