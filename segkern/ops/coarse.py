# SPDX-License-Identifier: Apache-2.0
"""Blurred queries at points between tokens, and outputs back at the tokens: small matrices on each axis, in PyTorch."""

from __future__ import annotations

import torch

from segkern.core.coarse_queries import cached_interpolation_matrix, cached_sampling_matrix, coarse_grid
from segkern.core.sigmas import equal_runs
from segkern.core.tracing import is_plain
from segkern.grid import Grid
from segkern.ops.operators import operator
from segkern.ops.torch_blur import compute_dtype, join, mix_axes


@operator("segkern::coarse_matrix")
def coarse_matrix(like: torch.Tensor, length: int, count: int, sigma: float | None, boundary: str) -> torch.Tensor:
    """The sampling matrix ``[count, length]`` of a sigma, or for None the interpolation matrix ``[length, count]``.

    It is made when the operator runs, never in a graph, in the precision that ``like`` is computed in.
    """
    return _matrix(like, length, count, sigma, boundary).clone()


@coarse_matrix.register_fake
def _(like: torch.Tensor, length: int, count: int, sigma: float | None, boundary: str) -> torch.Tensor:
    shape = (length, count) if sigma is None else (count, length)
    return like.new_empty(shape, dtype=compute_dtype(like.dtype))


def _matrix(like: torch.Tensor, length: int, count: int, sigma: float | None, boundary: str) -> torch.Tensor:
    dtype, device = compute_dtype(like.dtype), like.device
    if sigma is None:
        return cached_interpolation_matrix(length, count, boundary, dtype=dtype, device=device)
    return cached_sampling_matrix(length, sigma, count, boundary, dtype=dtype, device=device)


def _matrices(x: torch.Tensor, grid: Grid, coarse: Grid, sigma: float | None, boundary: str) -> list[torch.Tensor]:
    """Of both axes, height first."""
    make, like = (_matrix, x) if is_plain(x) else (coarse_matrix, x.detach())
    return [make(like, n, m, sigma, boundary) for n, m in ((grid.height, coarse.height), (grid.width, coarse.width))]


def coarse_queries(
    x: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], stride: tuple[int, int], boundary: str
) -> torch.Tensor:
    """The blurred image at the points of its coarse grid, one finite sigma per sample.

    The tokens of ``grid`` in ``[batch, heads, tokens, dim]`` give way to those of its coarse grid.
    """
    coarse = coarse_grid(grid, stride, boundary)
    parts = [
        mix_axes(x[samples], grid, *_matrices(x, grid, coarse, sigma, boundary))
        for samples, sigma in equal_runs(sigmas)
    ]
    if not parts:  # an empty batch
        return x.new_empty(0, x.shape[1], x.shape[2] - grid.tokens + coarse.tokens, x.shape[3])
    return parts[0] if len(parts) == 1 else join(parts, dim=0)


def coarse_outputs(x: torch.Tensor, grid: Grid, stride: tuple[int, int], boundary: str) -> torch.Tensor:
    """From the points of the coarse grid to all tokens of ``grid``."""
    coarse = coarse_grid(grid, stride, boundary)
    return mix_axes(x, coarse, *_matrices(x, grid, coarse, None, boundary))
