# SPDX-License-Identifier: Apache-2.0
"""Places in a UNet at which a branch can join the batch, and the hooks that make it join.

A perturbed branch equals the conditional branch until its first perturbed layer. The latest place to join is the
transformer block with that layer: the layer's residual connection needs the whole batch, and the layer itself shares
the queries, keys and values with the branch. Everything before it runs on the pipeline's own batch: earlier blocks,
earlier resnets and transformers in the same block, and earlier transformer blocks in the same transformer.

A block with an unknown forward is a single place: branches join before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import nn

from segkern.integrations.diffusers.models.layers import execution_order
from segkern.integrations.diffusers.runtime.block_changes import BlockJoin
from segkern.integrations.diffusers.runtime.branches import (
    MODULE_ARGUMENTS,
    Batch,
    Join,
    JoinPlan,
    JoinSkips,
)


@dataclass(frozen=True)
class Place:
    """A module at which branches can join.

    Attributes:
        name: Name of the module in the denoiser.
        module: The module.
        around: Name of the transformer that contains it, otherwise its own name.
    """

    name: str
    module: nn.Module
    around: str


class Places:
    """The places of a denoiser, in execution order."""

    def __init__(self, unet: Any) -> None:
        self._places: list[Place] = []
        self._joins: list[tuple[Join, int]] = []  # with the place whose batch size the module's arguments have
        self._blocks: dict[int, BlockJoin] = {}  # transformer blocks by place
        self._skips: list[tuple[JoinSkips, list[int]]] = []  # with the place of each resnet
        for name, block in execution_order(unet):
            parts = _parts(block)
            if parts is None:
                self._add(name, block, name)
                continue
            resnets = []
            for part_name, part in parts:
                full_name = f"{name}.{part_name}"
                if isinstance(part, ResnetBlock2D):
                    resnets.append(len(self._places))
                    self._add(full_name, part, full_name)
                    continue
                for number, inner in enumerate(part.transformer_blocks):
                    self._add(f"{full_name}.transformer_blocks.{number}", inner, full_name)
                # Outside its blocks, the transformer processes the whole batch that leaves the last block.
                self._joins.append((Join(part), len(self._places) - 1))
            if isinstance(block, (UpBlock2D, CrossAttnUpBlock2D)):
                self._skips.append((JoinSkips(block), resnets))

    def _add(self, name: str, module: nn.Module, around: str) -> None:
        place = len(self._places)
        if isinstance(module, BasicTransformerBlock):
            self._blocks[place] = BlockJoin(module, MODULE_ARGUMENTS, ("hidden_states",))
        self._joins.append((self._blocks.get(place) or Join(module), place))
        self._places.append(Place(name, module, around))

    @property
    def names(self) -> list[str]:
        """Names of the modules at the places."""
        return [place.name for place in self._places]

    def of(self, module: str) -> int:
        """Return the number of the place that contains a module."""
        return next(i for i, place in enumerate(self._places) if f"{module}.".startswith(f"{place.name}."))

    def last_of(self, part: str) -> int:
        """Return the number of the last place in ``"down"``, ``"mid"`` or ``"up"``, or before an empty part."""
        parts = ("down", "mid", "up")
        until = parts[: parts.index(part) + 1]
        return sum(place.name.startswith(until) for place in self._places) - 1

    def shares_inputs(self, place: int) -> bool:
        """Return True if a branch that joins at this place still equals the conditional branch at its first layer."""
        return isinstance(self._places[place].module, BasicTransformerBlock)

    def joins(self) -> list[Join]:
        """Return the hooks of all modules at which a branch may join."""
        return [*(join for join, _ in self._joins), *(skips for skips, _ in self._skips)]

    def joins_for(self, places: Sequence[int]) -> list[Join]:
        """Return the hooks of all modules that run with branches if branches join at these places."""
        around = self._places[min(places)].around
        begin = next(i for i, place in enumerate(self._places) if place.around == around)
        joins: list[Join] = [join for join, place in self._joins if place >= begin]
        return joins + [join for join, resnets in self._skips if resnets and resnets[-1] >= begin]

    def block(self, place: int) -> BlockJoin | None:
        """Return the hooks of the transformer block at a place; None if the place is another module."""
        return self._blocks.get(place)

    def plan(self, batch: Batch, branches: Sequence[int]) -> tuple[JoinPlan, ...]:
        """Return the plan of each join for a call in which each place runs with a given number of branches."""
        plans = [JoinPlan(batch, (branches[place],)) for _, place in self._joins]
        return (*plans, *(JoinPlan(batch, tuple(branches[place] for place in resnets)) for _, resnets in self._skips))

    def __len__(self) -> int:
        return len(self._places)


def _parts(block: nn.Module) -> list[tuple[str, Any]] | None:
    """Return resnets and transformers in execution order; None for an unknown block."""
    resnets = [(f"resnets.{i}", part) for i, part in enumerate(getattr(block, "resnets", ()))]
    attentions = [(f"attentions.{i}", part) for i, part in enumerate(getattr(block, "attentions", None) or ())]
    if type(block) in (DownBlock2D, UpBlock2D):
        parts = resnets
    elif type(block) in (CrossAttnDownBlock2D, CrossAttnUpBlock2D):
        parts = [part for pair in zip(resnets, attentions, strict=True) for part in pair]
    elif type(block) is UNetMidBlock2DCrossAttn:
        parts = [*resnets[:1], *[part for pair in zip(attentions, resnets[1:], strict=True) for part in pair]]
    else:
        return None
    return parts if all(type(part) in (ResnetBlock2D, Transformer2DModel) for _, part in parts) else None
