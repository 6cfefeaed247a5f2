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
from torch.utils.hooks import RemovableHandle

from segkern.integrations.diffusers.models.architectures import Architecture
from segkern.integrations.diffusers.runtime.branches import Batch, Join


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

    def of(self, module: str) -> int:
        """The number of the block that holds a module."""
        return next(i for i, name in enumerate(self._names) if f"{module}.".startswith(f"{name}."))

    def shares_inputs(self, place: int) -> bool:
        """True if a branch that joins there still equals the conditional one when its first layer gets it.

        It does, but the layer's own steps are not known, so that nothing is shared inside.
        """
        return False

    def hook(self, first: int) -> list[RemovableHandle]:
        """Hook all blocks, if there are any before the one of that number, at which the first branch joins."""
        if first == 0:
            return []
        return [join.module.register_forward_pre_hook(join, with_kwargs=True) for join in self._joins]

    def tell(self, batch: Batch | None, branches: Sequence[int]) -> None:
        """Before a forward: its batch, None if no branch joins inside, and the branches that each block runs with."""
        for place, join in enumerate(self._joins):
            join.batch = batch
            join.branches = branches[place] if batch is not None else 0

    def __len__(self) -> int:
        return len(self._names)
