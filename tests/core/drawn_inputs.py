# SPDX-License-Identifier: Apache-2.0
"""Random queries, keys and values for attention at few points: smooth and rough ones, and ones made to be hard."""

from __future__ import annotations

import math

import torch

from segkern import Grid

DIM = 64
KINDS = ("drawn", "one field", "edge", "large channels", "peaked rows", "outlier keys", "outlier values")


def field(heads: int, grid: Grid, steepness: float) -> torch.Tensor:
    """A random field ``[1, heads, tokens, 64]`` of unit spread whose spectrum falls like ``1 / f^steepness``."""
    down, across = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in (grid.height, grid.width))
    frequency = torch.hypot(down[:, None], across).clamp_min(1.0)
    white = torch.randn(heads, DIM, grid.height, grid.width, dtype=torch.float64)
    drawn = torch.fft.ifft2(torch.fft.fft2(white) / frequency**steepness).real
    return (drawn / drawn.std()).flatten(2).transpose(1, 2)[None]


def some_tokens(grid: Grid) -> torch.Tensor:
    return torch.randint(grid.tokens, (int(torch.randint(1, 6, ())),))


def uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def inputs(kind: str, grid: Grid, steepness: float, swing: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value whose logits have the standard deviation ``swing`` in every row."""
    query, key, value = (field(2, grid, steepness) for _ in range(3))
    if kind == "one field":  # as a layer has it: three projections of the same tokens
        tokens = field(2, grid, steepness)
        query, key, value = (tokens @ torch.randn(2, DIM, DIM, dtype=torch.float64) for _ in range(3))
    if kind == "edge":
        image = query.unflatten(2, (grid.height, grid.width))
        image[:, :, :, : grid.width // 3] += 3 * torch.randn(1, 2, 1, 1, DIM, dtype=torch.float64)
        query = image.flatten(2, 3)
    if kind == "large channels":
        query, key = (x + 5 * torch.randn(1, 2, 1, DIM, dtype=torch.float64) for x in (query, key))
    logits = query @ key.transpose(-1, -2) / math.sqrt(DIM)
    query *= swing / (logits - logits.mean(dim=-1, keepdim=True)).std()
    if kind == "peaked rows":
        query[:, :, some_tokens(grid)] *= uniform(10, 100)
    if kind == "outlier keys":
        key[:, :, some_tokens(grid)] *= uniform(5, 30)
    if kind == "outlier values":
        value[:, :, some_tokens(grid)] *= uniform(10, 100)
    return query, key, value
