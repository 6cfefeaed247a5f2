# SPDX-License-Identifier: Apache-2.0
"""The places of a UNet at which a branch can join the batch, and the hooks that make it join there.

A perturbed branch equals the conditional one until its first perturbed layer. The finest place to join is the
transformer block that holds it: the layer's residual connection inside needs the whole batch, and queries, keys and
values, which the branch shares, are shared by the layer itself. Everything before runs on the pipeline's own batch:
blocks, the resnets and transformers before it in its own block, and the transformer blocks before it in its own
transformer.

Blocks whose forward is not known are one place: a branch joins before them.
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
from segkern.integrations.diffusers.runtime.branches import Batch, Join, JoinPlan, JoinSkips


@dataclass(frozen=True)
class Place:
    """A module at which branches can join.

    Attributes:
        name: of the module in the denoiser.
        module: it.
        around: name of the transformer that holds it, or its own.
    """

    name: str
    module: nn.Module
    around: str


class Places:
    """The places of a denoiser, numbered in the order in which its forward comes to them."""

    def __init__(self, unet: Any) -> None:
        self._places: list[Place] = []
        self._joins: list[tuple[Join, int]] = []  # with the place whose batch the module's arguments have
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
                # What it does outside of its blocks is for the whole batch that leaves the last of them.
                self._joins.append((Join(part), len(self._places) - 1))
            if isinstance(block, (UpBlock2D, CrossAttnUpBlock2D)):
                self._skips.append((JoinSkips(block), resnets))

    def _add(self, name: str, module: nn.Module, around: str) -> None:
        self._joins.append((Join(module), len(self._places)))
        self._places.append(Place(name, module, around))

    @property
    def names(self) -> list[str]:
        """Names of the modules at the places."""
        return [place.name for place in self._places]

    def of(self, module: str) -> int:
        """The number of the place that holds a module."""
        return next(i for i, place in enumerate(self._places) if f"{module}.".startswith(f"{place.name}."))

    def last_of(self, part: str) -> int:
        """The number of the last place in ``"down"``, ``"mid"`` or ``"up"``, or before that part, if it has none."""
        parts = ("down", "mid", "up")
        until = parts[: parts.index(part) + 1]
        return sum(place.name.startswith(until) for place in self._places) - 1

    def shares_inputs(self, place: int) -> bool:
        """True if a branch that joins there still equals the conditional one when its first layer gets it."""
        return isinstance(self._places[place].module, BasicTransformerBlock)

    def joins(self) -> list[Join]:
        """The hooks of all modules at which a branch may join."""
        return [*(join for join, _ in self._joins), *(skips for skips, _ in self._skips)]

    def joins_for(self, places: Sequence[int]) -> list[Join]:
        """The hooks of all that branches run through that join at the places of these numbers."""
        around = self._places[min(places)].around
        begin = next(i for i, place in enumerate(self._places) if place.around == around)
        joins: list[Join] = [join for join, place in self._joins if place >= begin]
        return joins + [join for join, resnets in self._skips if resnets and resnets[-1] >= begin]

    def plan(self, batch: Batch, branches: Sequence[int]) -> tuple[JoinPlan, ...]:
        """For each of the joins its part in a forward of a batch in which each place runs with so many branches."""
        plans = [JoinPlan(batch, (branches[place],)) for _, place in self._joins]
        return (*plans, *(JoinPlan(batch, tuple(branches[place] for place in resnets)) for _, resnets in self._skips))

    def __len__(self) -> int:
        return len(self._places)


def _parts(block: nn.Module) -> list[tuple[str, Any]] | None:
    """Resnets and transformers in the order in which a block runs them; None for a block that is not known."""
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
