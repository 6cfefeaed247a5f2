# SPDX-License-Identifier: Apache-2.0
"""The plan of one forward: a frozen description for each guided layer, beside those of the joins.

Forwards with equal inputs share their plans. What a forward leaves behind (norms, masses) is not part of them.
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
    """One layer's part in a forward.

    Attributes:
        sigmas: one per sample of the batch that reaches the layer.
        strides: of the query rows, one per sample.
        blends: one per sample; less than 1 mixes in the sample's own attention.
        conditional: the samples of the conditional branch.
        own: number of samples, from the first, with hidden states of their own; those after them, whose branches have
            just joined, repeat the conditional ones.
        perturbed: for each guidance that acts on the layer, the samples of its branch.
        read: samples of which to tell how much attention each token receives; None for none.
        graph_sigmas: the sigmas with 1 for any finite one, which is all that a compiled graph knows of them.
        values: the sigmas in a CPU tensor, which a compiled graph reads when it runs; None where it knows them all.
        acts: whether any sample is perturbed.
        kind: what plans have in common that differ in nothing but the numbers of finite sigmas.
    """

    sigmas: tuple[Perturbed, ...]
    strides: tuple[Stride, ...]
    blends: tuple[float, ...]
    conditional: slice
    own: int
    perturbed: tuple[slice, ...] = ()
    read: slice | None = None
    graph_sigmas: tuple[Perturbed, ...] = field(init=False)
    values: torch.Tensor | None = field(init=False, compare=False)
    acts: bool = field(init=False)
    kind: tuple[Any, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        kinds = tuple(1.0 if is_finite(sigma) else sigma for sigma in self.sigmas)
        values = None
        # Where a sample has a sigma for each head, calls with numbers from here would not know them.
        if any(map(is_finite, self.sigmas)) and not any(isinstance(sigma, tuple) for sigma in self.sigmas):
            values = _tensor(tuple(sigma if isinstance(sigma, float) else 0.0 for sigma in self.sigmas))
        object.__setattr__(self, "graph_sigmas", kinds)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "acts", any(kinds))
        slices = tuple(None if x is None else (x.start, x.stop) for x in (self.conditional, *self.perturbed, self.read))
        object.__setattr__(self, "kind", (kinds, self.strides, self.blends, self.own, slices))

    def told_sigmas(self) -> tuple[tuple[Perturbed, ...], torch.Tensor | None]:
        """Numbers, or in a graph that is being compiled kinds and the tensor with the numbers.

        Points between tokens, heads with sigmas of their own, and gradients are made for certain numbers.
        """
        rows = all(stride == EVERY_TOKEN for stride in self.strides)
        if torch.compiler.is_compiling() and self.values is not None and rows and not torch.is_grad_enabled():
            return self.graph_sigmas, self.values
        return self.sigmas, None


@dataclass(frozen=True)
class ForwardPlan:
    """The plan of a whole forward.

    Attributes:
        layers: of each guided layer, in their order.
        joins: of each module at which branches may join, in their order; None where none joins inside.
    """

    layers: tuple[LayerPlan, ...]
    joins: tuple[JoinPlan, ...] | None


@lru_cache(maxsize=256)
def _tensor(sigmas: tuple[float, ...]) -> torch.Tensor:
    """On the CPU, made once, whatever the caller's modes."""
    return call_in_own_thread(lambda: torch.tensor(sigmas, dtype=torch.float64, device="cpu"))


@lru_cache(maxsize=256)
def shaped(grid: Grid) -> torch.Tensor:
    """A tensor of one number in memory, whose shape are a grid's numbers; made once, whatever the caller's modes."""
    return call_in_own_thread(
        lambda: torch.zeros((), device="cpu").expand(grid.height, grid.width, grid.start, grid.frames)
    )
