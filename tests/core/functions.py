# SPDX-License-Identifier: Apache-2.0
"""The public functions, and those of the reference, as functions of query, key and value."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import segkern
from segkern import Grid, reference

GRID, SIGMA = Grid(2, 5, start=1), (1.3, math.inf)
SHAPE = (2, 2, 12, 8)

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "seg_attention": lambda q, k, v, **o: segkern.seg_attention(q, k, v, GRID, SIGMA, **o),
    "gaussian_blur": lambda q, k, v, **o: segkern.gaussian_blur(q, GRID, SIGMA, **o),
    "attention_mass": lambda q, k, v, **o: segkern.attention_mass(q, k, **o),
    "attention_energy": lambda q, k, v, **o: segkern.attention_energy(q, k, GRID, SIGMA, **o),
    "coarse queries": lambda q, k, v, **o: segkern.seg_attention(q, k, v, GRID, SIGMA, query_stride=2, **o),
}
PLAIN: dict[str, Callable[..., torch.Tensor]] = {
    "seg_attention": lambda q, k, v: reference.seg_attention(q, k, v, GRID, SIGMA),
    "gaussian_blur": lambda q, k, v: reference.gaussian_blur(q, GRID, SIGMA),
    "attention_mass": lambda q, k, v: reference.attention_mass(q, k),
    "attention_energy": lambda q, k, v: reference.attention_energy(q, k, GRID, SIGMA),
    "coarse queries": lambda q, k, v: reference.seg_attention(q, k, v, GRID, SIGMA, query_stride=2),
}


def tensors(dtype: torch.dtype = torch.float32, batch: int = SHAPE[0]) -> list[torch.Tensor]:
    """Return query, key and value of normal values, equal at every call."""
    shape = (batch, *SHAPE[1:])
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
