# SPDX-License-Identifier: Apache-2.0
"""The plan of a denoiser call: an immutable description for each guided layer and each join.

Calls with equal inputs share their plans. Plans do not contain results of a call (norms, masses).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from segkern.core.bounded_cache import call_in_own_thread
from segkern.grid import Grid
from segkern.integrations.diffusers.runtime.branches import JoinPlan
from segkern.integrations.diffusers.runtime.query_rows import EVERY_TOKEN, Stride, is_finite
from segkern.integrations.specs.sigmas import Perturbed


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one layer in a call.

    Attributes:
        sigmas: One per sample of the layer's batch.
        strides: Query stride of each sample.
        blends: Share of the perturbed attention in each sample's output; below 1, its own attention is mixed in.
        conditional: Samples of the conditional branch.
        own: Number of samples, from the first, with their own hidden states. The samples after them belong to branches
            that have just joined, and repeat the conditional samples.
        perturbed: Samples of each branch that is perturbed in the layer.
        read: Samples whose attention mass is computed; None for none.
        starts: First image token of each sample; empty if it is the grid's for all samples.
        graph_sigmas: The sigmas with 1 in place of any finite value. A compiled graph depends only on these.
        values: The sigmas in a CPU tensor, which a compiled graph reads when it runs; None if it needs none.
        acts: Whether any sample is perturbed.
        kind: Key that is equal for plans that differ only in the values of finite sigmas.
    """

    sigmas: tuple[Perturbed, ...]
    strides: tuple[Stride, ...]
    blends: tuple[float, ...]
    conditional: slice
    own: int
    perturbed: tuple[slice, ...] = ()
    read: slice | None = None
    starts: tuple[int, ...] = ()
    graph_sigmas: tuple[Perturbed, ...] = field(init=False)
    values: torch.Tensor | None = field(init=False, compare=False)
    acts: bool = field(init=False)
    kind: tuple[Any, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        kinds = tuple(1.0 if is_finite(sigma) else sigma for sigma in self.sigmas)
        values = None
        # A tensor of values has no sigmas per head, so it is not used if a sample has them.
        if any(map(is_finite, self.sigmas)) and not any(isinstance(sigma, tuple) for sigma in self.sigmas):
            values = _tensor(tuple(sigma if isinstance(sigma, float) else 0.0 for sigma in self.sigmas))
        object.__setattr__(self, "graph_sigmas", kinds)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "acts", any(kinds))
        slices = tuple(None if x is None else (x.start, x.stop) for x in (self.conditional, *self.perturbed, self.read))
        object.__setattr__(self, "kind", (kinds, self.strides, self.blends, self.own, slices, self.starts))

    def told_sigmas(self) -> tuple[tuple[Perturbed, ...], torch.Tensor | None]:
        """Return the sigmas as numbers or, while compiling, as kinds and a tensor of values.

        Query strides, sigmas per head and gradients need fixed numbers.
        """
        rows = all(stride == EVERY_TOKEN for stride in self.strides)
        if torch.compiler.is_compiling() and self.values is not None and rows and not torch.is_grad_enabled():
            return self.graph_sigmas, self.values
        return self.sigmas, None


@dataclass(frozen=True)
class ForwardPlan:
    """The plan of a whole denoiser call.

    Attributes:
        layers: Plan of each guided layer, in order.
        joins: Plan of each module at which branches may join, in order; None for modules that run unchanged.
    """

    layers: tuple[LayerPlan, ...]
    joins: tuple[JoinPlan | None, ...]


@lru_cache(maxsize=256)
def _tensor(sigmas: tuple[float, ...]) -> torch.Tensor:
    """Return the sigmas as a CPU tensor, created once and independently of the caller's modes."""
    return call_in_own_thread(lambda: torch.tensor(sigmas, dtype=torch.float64, device="cpu"))


@lru_cache(maxsize=256)
def shaped(grid: Grid) -> torch.Tensor:
    """Return a tensor with one element in memory, whose shape holds a grid's numbers. Created like ``_tensor``."""
    return call_in_own_thread(
        lambda: torch.zeros((), device="cpu").expand(grid.height, grid.width, grid.start, grid.frames)
    )
