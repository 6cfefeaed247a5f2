# SPDX-License-Identifier: Apache-2.0
"""Tools for the tests of energy and its theory: logits of many kinds, dense blurs, and an explicit log-sum-exp."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from segkern import Grid
from segkern.core.gaussian import blur_matrix

MEAN_KEEPING = ("symmetric", "circular")
BOUNDARIES = ("reflect", *MEAN_KEEPING)
KINDS = ("random", "constant", "one-hot", "checkerboard", "smooth", "huge", "low rank")
SIGMAS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.2, 2.5, 4.0, 10.0, 100.0, math.inf)

grids = st.builds(Grid, st.integers(1, 7), st.integers(1, 7))
sigmas = st.sampled_from(SIGMAS)
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32 - 1)


def dense(grid: Grid, sigma: float, boundary: str) -> torch.Tensor:
    """Return the blur over the grid as one float64 matrix ``[tokens, tokens]``."""
    axes = [blur_matrix(n, sigma, boundary, dtype=torch.float64) for n in (grid.height, grid.width)]
    return torch.kron(*axes)


def fields(kind: str, grid: Grid, count: int, seed: int) -> torch.Tensor:
    """Return float64 logits ``[tokens, count]``: ``count`` fields over the grid."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    rows = torch.arange(grid.height, dtype=torch.float64)[:, None]
    columns = torch.arange(grid.width, dtype=torch.float64)[None, :]
    size = 1.0 + 5.0 * torch.rand(count, generator=draw, dtype=torch.float64)
    if kind == "constant":
        return normal(count).expand(grid.tokens, count).clone()
    if kind == "one-hot":
        peaks = torch.zeros(grid.tokens, count, dtype=torch.float64)
        where = torch.randint(grid.tokens, (count,), generator=draw)
        peaks[where, torch.arange(count)] = 1.0
        return 4.0 * size * peaks
    if kind == "checkerboard":
        return size * (1.0 - 2.0 * ((rows + columns) % 2)).reshape(-1, 1)
    if kind == "smooth":
        tilt = normal(2, count)
        return (rows[..., None] * tilt[0] + columns[..., None] * tilt[1]).flatten(0, 1) / max(grid.height, grid.width)
    if kind == "huge":
        return 1e3 * normal(grid.tokens, count)
    if kind == "low rank":
        return normal(grid.tokens, 2) @ normal(2, count)
    return size * normal(grid.tokens, count)


def lse(logits: torch.Tensor, axis: int) -> torch.Tensor:
    """Compute the log-sum-exp along an axis explicitly."""
    largest = logits.amax(dim=axis, keepdim=True)
    return (logits - largest).exp().sum(dim=axis).log() + largest.squeeze(axis)


def slack(logits: torch.Tensor) -> float:
    """Return a bound on the rounding error of a float64 sum of these logits."""
    return 64 * 2.0**-52 * (1.0 + logits.abs().max().item()) * math.sqrt(logits.numel())
