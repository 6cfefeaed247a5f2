# SPDX-License-Identifier: Apache-2.0
"""Perturbed self-attention with blurred queries or identity attention, computed by segkern's functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch

from segkern import Grid, gaussian_blur, seg_attention

from .report import GuidanceReport

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Perturbation:
    """Perturbed attention of one guidance method.

    Attributes:
        sigma: Standard deviation of the query blur; None for identity attention.
        report: Report that records each layer's effect.
        computed: Names of the layers that were perturbed.
    """

    sigma: float | None
    report: GuidanceReport
    computed: set[str] = field(default_factory=set)

    def __call__(
        self,
        layer: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: Grid,
        attend: Attend,
        fused: bool,
    ) -> torch.Tensor:
        """Return the attention output ``[batch, heads, tokens, head_dim]``, perturbed on the grid's tokens.

        Args:
            layer: Name of the layer.
            query: ``[batch, heads, tokens, head_dim]``, after norms and rotary embedding.
            key: Keys of the same tokens, or more.
            value: Values of the same tokens as ``key``.
            grid: Grid of the image in the tokens.
            attend: The layer's own attention, including changes by other nodes.
            fused: Whether no other node changes the attention, so segkern may compute all of it.
        """
        self.computed.add(layer)
        if self.sigma is None:
            output = _identity(query, key, value, grid, attend)
        elif fused:
            output = cast(torch.Tensor, seg_attention(query, key, value, grid, self.sigma))
        else:
            output = attend(gaussian_blur(query, grid, self.sigma), key, value)
        if self.report.wants(layer):
            self.report.note(layer, output, attend(query, key, value))
        return output


def _identity(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: Grid, attend: Attend) -> torch.Tensor:
    """Return attention output in which every image token attends only to itself."""
    if value.shape[2] != query.shape[2]:
        raise ValueError(
            f"PAG cannot act in a layer with {query.shape[2]} queries and {value.shape[2]} values, because another "
            f"node adds tokens; choose other layers, or use SEG"
        )
    if grid.tokens == query.shape[2]:
        return value[:, :, : grid.tokens]
    output = attend(query, key, value).clone()
    output[:, :, grid.start : grid.stop] = value[:, :, grid.start : grid.stop]
    return output
