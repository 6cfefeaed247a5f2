# SPDX-License-Identifier: Apache-2.0
"""Blurred queries at points between tokens, and outputs interpolated back to the tokens: small matrices per axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkern.core.coarse_queries import cached_interpolation_matrix, cached_sampling_matrix, coarse_grid
from segkern.core.precision import exact_dtype
from segkern.core.sigmas import equal_runs
from segkern.core.tracing import is_plain
from segkern.grid import Grid
from segkern.ops.operators import check_call, operator, save_linear, tokens_first
from segkern.ops.torch_blur import join, mix_axes


@operator("segkern::coarse_queries")
def coarse_queries_operator(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    stride: Sequence[int],
    boundary: str,
    adjoint: bool = False,
) -> torch.Tensor:
    """See :func:`coarse_queries`. ``adjoint`` applies the transposed map, from the points to the tokens."""
    grid, stride = Grid(height, width, start), (stride[0], stride[1])
    _, sigmas = check_call(x, *_axes(coarse_grid(grid, stride, boundary) if adjoint else grid), sigma, boundary)
    return tokens_first(_sample(x, grid, sigmas, stride, boundary, adjoint))


@operator("segkern::coarse_outputs")
def coarse_outputs_operator(
    x: torch.Tensor, height: int, width: int, start: int, stride: Sequence[int], boundary: str, adjoint: bool = False
) -> torch.Tensor:
    """See :func:`coarse_outputs`. ``adjoint`` applies the transposed map, from the tokens to the points."""
    grid, stride = Grid(height, width, start), (stride[0], stride[1])
    check_call(x, *_axes(grid if adjoint else coarse_grid(grid, stride, boundary)), (0.0,), boundary)
    return tokens_first(_interpolate(x, grid, stride, boundary, adjoint))


@coarse_queries_operator.register_fake
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
    return _empty(x, Grid(height, width, start), stride, boundary, to_points=not adjoint)


@coarse_outputs_operator.register_fake
def _(
    x: torch.Tensor, height: int, width: int, start: int, stride: Sequence[int], boundary: str, adjoint: bool = False
) -> torch.Tensor:
    return _empty(x, Grid(height, width, start), stride, boundary, to_points=adjoint)


def _queries_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return coarse_queries_operator(grad, *ctx.arguments, not ctx.adjoint), *(None,) * 7


def _outputs_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return coarse_outputs_operator(grad, *ctx.arguments, not ctx.adjoint), *(None,) * 6


coarse_queries_operator.register_autograd(_queries_gradient, setup_context=save_linear)
coarse_outputs_operator.register_autograd(_outputs_gradient, setup_context=save_linear)


def coarse_queries(
    x: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], stride: tuple[int, int], boundary: str
) -> torch.Tensor:
    """Return the blurred image at the points of its coarse grid, with one finite sigma for all samples or per sample.

    In ``[batch, heads, tokens, dim]``, the tokens of the coarse grid replace those of ``grid``.
    """
    if is_plain(x):
        return _sample(x, grid, sigmas, stride, boundary)
    return coarse_queries_operator(x, *_axes(grid), sigmas, stride, boundary)


def coarse_outputs(x: torch.Tensor, grid: Grid, stride: tuple[int, int], boundary: str) -> torch.Tensor:
    """Interpolate from the points of the coarse grid to all tokens of ``grid``."""
    if is_plain(x):
        return _interpolate(x, grid, stride, boundary)
    return coarse_outputs_operator(x, *_axes(grid), stride, boundary)


def _sample(
    x: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    stride: tuple[int, int],
    boundary: str,
    adjoint: bool = False,
) -> torch.Tensor:
    coarse, dtype = coarse_grid(grid, stride, boundary), exact_dtype(x)
    parts = []
    for samples, sigma in equal_runs(sigmas) or [(slice(0), 0.0)]:  # an empty batch is one empty run
        rows, columns = (
            cached_sampling_matrix(length, sigma, count, boundary, dtype=dtype, device=x.device)
            for length, count in ((grid.height, coarse.height), (grid.width, coarse.width))
        )
        if adjoint:
            parts.append(mix_axes(x[samples], coarse, rows.T, columns.T))
        else:
            parts.append(mix_axes(x[samples], grid, rows, columns))
    return parts[0] if len(parts) == 1 else join(parts, dim=0)


def _interpolate(
    x: torch.Tensor, grid: Grid, stride: tuple[int, int], boundary: str, adjoint: bool = False
) -> torch.Tensor:
    coarse = coarse_grid(grid, stride, boundary)
    rows, columns = (
        cached_interpolation_matrix(length, count, boundary, dtype=exact_dtype(x), device=x.device)
        for length, count in ((grid.height, coarse.height), (grid.width, coarse.width))
    )
    return mix_axes(x, grid, rows.T, columns.T) if adjoint else mix_axes(x, coarse, rows, columns)


def _axes(grid: Grid) -> tuple[int, int, int]:
    return grid.height, grid.width, grid.start


def _empty(x: torch.Tensor, grid: Grid, stride: Sequence[int], boundary: str, *, to_points: bool) -> torch.Tensor:
    """Return an empty result with the image's token count changed to or from that of the coarse grid."""
    fewer = grid.tokens - coarse_grid(grid, (stride[0], stride[1]), boundary).tokens
    batch, heads, tokens, dim = x.shape
    shape = batch, heads, tokens - fewer if to_points else tokens + fewer, dim
    return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device)
