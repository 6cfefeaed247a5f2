# SPDX-License-Identifier: Apache-2.0
"""The ways to compute one layer's attention in a guided step, as closures over the same inputs.

A batch is [unconditional, conditional, perturbed]; only the last third is blurred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import segkern
from segkern import Grid
from segkern.blur import gaussian_taps

Provider = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One shape: tokens of the grid, heads, head dimension, batch (a third of it blurred), dtype."""

    grid: Grid
    heads: int
    head_dim: int = 64
    batch: int = 3
    dtype: torch.dtype = torch.float32

    @property
    def label(self) -> str:
        """Such as ``64x64 tokens, 10 heads``."""
        return f"{self.grid.height}x{self.grid.width} tokens, {self.heads} heads"

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random query, key and value laid out as projections give them: ``[batch, tokens, heads, dim]``."""
        shape = (self.batch, self.grid.tokens, self.heads, self.head_dim)
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator).to(device, self.dtype) for _ in range(3)]
        return drawn[0].transpose(1, 2), drawn[1].transpose(1, 2), drawn[2].transpose(1, 2)

    def sigmas(self, sigma: float) -> tuple[float, ...]:
        """One sigma per sample: the last third is blurred."""
        third = self.batch // 3
        return (0.0,) * (2 * third) + (sigma,) * third


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, case: Case, sigma: float) -> Provider:
    """PyTorch's attention without any blur: the floor that a user compares with."""
    return lambda: F.scaled_dot_product_attention(query, key, value)


def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, case: Case, sigma: float) -> Provider:
    """``segkern.seg_attention`` with the backend left to it."""
    sigmas = case.sigmas(sigma)
    return lambda: segkern.seg_attention(query, key, value, case.grid, sigmas)


def official(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, case: Case, sigma: float) -> Provider:
    """The official algorithm: a depthwise 2-D convolution of the perturbed queries, ``cat`` of the batch, attention.

    Written from its description and fixed to take any grid; the kernel is built on the host at every call, as there.
    """
    third = case.batch // 3
    height, width = case.grid.height, case.grid.width

    def blurred(perturbed: torch.Tensor) -> torch.Tensor:
        if math.isinf(sigma):
            return perturbed.mean(dim=2, keepdim=True).expand_as(perturbed)
        channels = case.heads * case.head_dim
        image = perturbed.transpose(2, 3).reshape(third, channels, height, width)
        rows, columns = gaussian_taps(sigma, height), gaussian_taps(sigma, width)
        kernel = torch.outer(rows, columns).to(image.device, image.dtype)
        kernel = kernel.expand(channels, 1, *kernel.shape)
        pad_w, pad_h = columns.numel() // 2, rows.numel() // 2
        image = F.conv2d(F.pad(image, (pad_w, pad_w, pad_h, pad_h), mode="reflect"), kernel, groups=channels)
        return image.view(third, case.heads, case.head_dim, height * width).transpose(2, 3)

    def run() -> torch.Tensor:
        plain, perturbed = query[: 2 * third], query[2 * third :]
        return F.scaled_dot_product_attention(torch.cat([plain, blurred(perturbed)]), key, value)

    return run
