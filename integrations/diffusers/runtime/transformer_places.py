# SPDX-License-Identifier: Apache-2.0
"""The blocks of a transformer at which a branch can join the batch.

The denoiser's input is the enlarged batch, so the few modules before and after its blocks run on all branches. The
blocks before the first perturbed block run on the pipeline's own batch: hooks cut their arguments to it, and other
hooks let the branch join again where it begins to differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from segkern.integrations.diffusers.models.architectures import Architecture
from segkern.integrations.diffusers.runtime.block_changes import BlockJoin
from segkern.integrations.diffusers.runtime.branches import Batch, Join, JoinPlan


class BlockPlaces:
    """The blocks of a transformer, in execution order."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self._names: list[str] = []
        self._joins: list[BlockJoin] = []
        for stage in architecture.stages:
            blocks: Any = model.get_submodule(stage.blocks)
            for number, block in enumerate(blocks):
                self._names.append(f"{stage.blocks}.{number}")
                self._joins.append(BlockJoin(block, stage.batched, stage.outputs))

    @property
    def names(self) -> list[str]:
        """Names of the blocks."""
        return self._names

    def of(self, module: str) -> int:
        """Return the number of the block that contains a module."""
        return next(i for i, name in enumerate(self._names) if f"{module}.".startswith(f"{name}."))

    def shares_inputs(self, place: int) -> bool:
        """Return whether the first layer of a branch shares its inputs with the conditional branch: always False.

        The inputs are equal, but the layer's own steps are unknown, so it shares nothing.
        """
        return False

    def joins(self) -> Sequence[Join]:
        """Return the hooks of all blocks."""
        return self._joins

    def joins_for(self, places: Sequence[int]) -> Sequence[Join]:
        """Return the hooks that are needed if branches join at these blocks: none or all."""
        return self._joins if max(places) > 0 else []

    def block(self, place: int) -> BlockJoin | None:
        """Return the hooks of a block."""
        return self._joins[place]

    def plan(self, batch: Batch, branches: Sequence[int]) -> tuple[JoinPlan, ...]:
        """Return the plan of each join for a call in which each block runs with a given number of branches."""
        return tuple(JoinPlan(batch, (count,)) for count in branches)

    def __len__(self) -> int:
        return len(self._names)
