# SPDX-License-Identifier: Apache-2.0
"""The official algorithm's blur, written from its description and mended to take any grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from segkern import Grid
from segkern.core.gaussian import gaussian_taps


def official_blur(image: torch.Tensor, grid: Grid, sigma: float) -> torch.Tensor:
    """``[batch, heads, tokens, dim]`` of image tokens, its kernel built on the host at every call."""
    if math.isinf(sigma):
        return image.mean(dim=2, keepdim=True).expand_as(image)
    batch, heads, tokens, dim = image.shape
    planes = image.transpose(2, 3).reshape(batch, heads * dim, grid.height, grid.width)
    rows, columns = gaussian_taps(sigma, grid.height), gaussian_taps(sigma, grid.width)
    kernel = torch.outer(rows, columns).to(image.device, image.dtype)
    kernel = kernel.expand(heads * dim, 1, *kernel.shape)
    pad_w, pad_h = columns.numel() // 2, rows.numel() // 2
    planes = F.conv2d(F.pad(planes, (pad_w, pad_w, pad_h, pad_h), mode="reflect"), kernel, groups=heads * dim)
    return planes.view(batch, heads, dim, tokens).transpose(2, 3)
