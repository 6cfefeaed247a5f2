# SPDX-License-Identifier: Apache-2.0
"""The blocks of a transformer, at which a branch can join the batch.

A forward of the denoiser takes the enlarged batch at its input, so that whatever it does before and after its blocks
fits; that is little. The blocks before the first perturbed one run on the pipeline's own batch: hooks cut their
arguments to it, and others let the branch join again where it begins to differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from segkern.integrations.diffusers.models.architectures import Architecture
from segkern.integrations.diffusers.runtime.branches import Batch, Join, JoinPlan


class BlockPlaces:
    """The blocks of a transformer, numbered in the order in which its forward comes to them."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self._names: list[str] = []
        self._joins: list[Join] = []
        for stage in architecture.stages:
            blocks: Any = model.get_submodule(stage.blocks)
            for number, block in enumerate(blocks):
                self._names.append(f"{stage.blocks}.{number}")
                self._joins.append(Join(block, stage.batched))

    @property
    def names(self) -> list[str]:
        """Names of the blocks."""
        return self._names

    def of(self, module: str) -> int:
        """The number of the block that holds a module."""
        return next(i for i, name in enumerate(self._names) if f"{module}.".startswith(f"{name}."))

    def shares_inputs(self, place: int) -> bool:
        """True if a branch that joins there still equals the conditional one when its first layer gets it.

        It does, but the layer's own steps are not known, so that nothing is shared inside.
        """
        return False

    def joins(self) -> list[Join]:
        """The hooks of all blocks."""
        return self._joins

    def joins_for(self, places: Sequence[int]) -> list[Join]:
        """The hooks that are needed when branches join at the blocks of these numbers: none, or all."""
        return self._joins if max(places) > 0 else []

    def plan(self, batch: Batch, branches: Sequence[int]) -> tuple[JoinPlan, ...]:
        """For each of the joins its part in a forward of a batch in which each block runs with so many branches."""
        return tuple(JoinPlan(batch, (count,)) for count in branches)

    def __len__(self) -> int:
        return len(self._names)
