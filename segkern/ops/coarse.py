# SPDX-License-Identifier: Apache-2.0
"""The operators ``segkern::coarse_queries`` and ``segkern::coarse_outputs``: to points between tokens and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkern.core.coarse_queries import (
    cached_interpolation_matrix,
    cached_sampling_matrix,
    coarse_grid,
    point_count,
)
from segkern.core.gaussian import check_boundary
from segkern.core.sigmas import check_sigma, equal_runs
from segkern.grid import Grid
from segkern.ops.operators import empty_output, operator, save_linear, tokens_first
from segkern.ops.torch_blur import compute_dtype, join, mix_axes


def to_points(
    x: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    stride: tuple[int, int],
    boundary: str,
    adjoint: bool = False,
) -> torch.Tensor:
    """The blurred image at the points of its coarse grid, one finite sigma per sample.

    The tokens of ``grid`` in ``[batch, heads, tokens, dim]`` give way to those of its coarse grid; ``adjoint`` applies
    the transpose, which brings them back.
    """
    coarse = coarse_grid(grid, stride, boundary)
    compute = compute_dtype(x.dtype)
    parts = []
    for samples, sigma in equal_runs(sigmas):
        matrices = [
            cached_sampling_matrix(n, sigma, m, boundary, dtype=compute, device=x.device)
            for n, m in ((grid.height, coarse.height), (grid.width, coarse.width))
        ]
        if adjoint:
            parts.append(mix_axes(x[samples], coarse, matrices[0].T, matrices[1].T))
        else:
            parts.append(mix_axes(x[samples], grid, *matrices))
    if not parts:  # an empty batch
        into = grid if adjoint else coarse
        return x.new_empty(0, x.shape[1], x.shape[2] - (coarse if adjoint else grid).tokens + into.tokens, x.shape[3])
    return parts[0] if len(parts) == 1 else join(parts, dim=0)


def to_tokens(
    x: torch.Tensor, grid: Grid, stride: tuple[int, int], boundary: str, adjoint: bool = False
) -> torch.Tensor:
    """From the points of the coarse grid to all tokens of ``grid``; ``adjoint`` applies the transpose."""
    coarse = coarse_grid(grid, stride, boundary)
    compute = compute_dtype(x.dtype)
    rows, columns = (
        cached_interpolation_matrix(n, m, boundary, dtype=compute, device=x.device)
        for n, m in ((grid.height, coarse.height), (grid.width, coarse.width))
    )
    return mix_axes(x, grid, rows.T, columns.T) if adjoint else mix_axes(x, coarse, rows, columns)


@operator("segkern::coarse_queries")
def coarse_queries(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    stride: Sequence[int],
    boundary: str,
    adjoint: bool = False,
) -> torch.Tensor:
    """See :func:`to_points`."""
    check_boundary(boundary)
    grid, pair = Grid(height, width, start), (stride[0], stride[1])
    (coarse_grid(grid, pair, boundary) if adjoint else grid).check(x.shape[2])
    sigmas = check_sigma(sigma, x.shape[0])
    return tokens_first(to_points(x, grid, sigmas, pair, boundary, adjoint))


@coarse_queries.register_fake
def _(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    stride: Sequence[int],
    boundary: str,
    adjoint: bool = False,
) -> torch.Tensor:
    more = _saved_tokens(height, width, stride, boundary)
    return empty_output(x, x.shape[3], more if adjoint else -more)


def _coarse_queries_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return coarse_queries(grad, *ctx.arguments, not ctx.adjoint), *(None,) * 7


@operator("segkern::coarse_outputs")
def coarse_outputs(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    stride: Sequence[int],
    boundary: str,
    adjoint: bool = False,
) -> torch.Tensor:
    """See :func:`to_tokens`."""
    check_boundary(boundary)
    grid, pair = Grid(height, width, start), (stride[0], stride[1])
    (grid if adjoint else coarse_grid(grid, pair, boundary)).check(x.shape[2])
    return tokens_first(to_tokens(x, grid, pair, boundary, adjoint))


@coarse_outputs.register_fake
def _(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    stride: Sequence[int],
    boundary: str,
    adjoint: bool = False,
) -> torch.Tensor:
    more = _saved_tokens(height, width, stride, boundary)
    return empty_output(x, x.shape[3], -more if adjoint else more)


def _coarse_outputs_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return coarse_outputs(grad, *ctx.arguments, not ctx.adjoint), *(None,) * 6


def _saved_tokens(height: int, width: int, stride: Sequence[int], boundary: str) -> int:
    """The tokens of a grid less the points of its coarse grid."""
    return height * width - point_count(height, stride[0], boundary) * point_count(width, stride[1], boundary)


coarse_queries.register_autograd(_coarse_queries_gradient, setup_context=save_linear)
coarse_outputs.register_autograd(_coarse_outputs_gradient, setup_context=save_linear)
