# SPDX-License-Identifier: Apache-2.0
"""Perturbed self-attention: blurred queries or the identity, by segkern's functions."""

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
    """The attention of one guidance's degraded prediction.

    Attributes:
        sigma: of the blur of queries; None for the identity instead of attention.
        report: where each layer's effect is noted.
        computed: names of the layers that it perturbed.
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
        """Attention output ``[batch, heads, tokens, head_dim]`` of a layer, perturbed on the grid's tokens.

        Args:
            layer: its name.
            query: ``[batch, heads, tokens, head_dim]``, after norms and rotary embedding.
            key: of the same tokens, or more.
            value: the same.
            grid: of the image among the tokens.
            attend: the layer's own attention, with whatever other nodes changed in it.
            fused: whether no other node changes the attention, so that segkern may compute all of it.
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
    """Attention whose map is the identity for image tokens."""
    if value.shape[2] != query.shape[2]:
        raise ValueError(
            f"PAG cannot act in a layer whose {query.shape[2]} queries look at {value.shape[2]} tokens: another node "
            f"gives it more; choose other layers, or SEG"
        )
    if grid.tokens == query.shape[2]:
        return value[:, :, : grid.tokens]
    output = attend(query, key, value).clone()
    output[:, :, grid.start : grid.stop] = value[:, :, grid.start : grid.stop]
    return output
