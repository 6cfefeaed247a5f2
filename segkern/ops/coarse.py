# SPDX-License-Identifier: Apache-2.0
"""The operators ``segkern::coarse_*``: queries and outputs at points between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkern.core.coarse_queries import coarse_grid, point_count
from segkern.core.gaussian import check_boundary, check_sigma
from segkern.grid import Grid
from segkern.ops import torch_attention
from segkern.ops.attention import TAGS, linear_context, tokens_first


@torch.library.custom_op("segkern::coarse_queries", mutates_args=(), tags=TAGS)
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
    """See :func:`segkern.ops.torch_attention.coarse_queries`."""
    check_boundary(boundary)
    grid, pair = Grid(height, width, start), (stride[0], stride[1])
    (coarse_grid(grid, pair, boundary) if adjoint else grid).check(x.shape[2])
    return tokens_first(
        torch_attention.coarse_queries(x, grid, check_sigma(sigma, x.shape[0]), pair, boundary, adjoint)
    )


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
    return _resized(x, height, width, stride, boundary, coarser=not adjoint)


def _coarse_queries_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return coarse_queries(grad, *ctx.arguments, not ctx.adjoint), *(None,) * 7


@torch.library.custom_op("segkern::coarse_outputs", mutates_args=(), tags=TAGS)
def coarse_outputs(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    stride: Sequence[int],
    boundary: str,
    adjoint: bool = False,
) -> torch.Tensor:
    """See :func:`segkern.ops.torch_attention.coarse_outputs`."""
    check_boundary(boundary)
    grid, pair = Grid(height, width, start), (stride[0], stride[1])
    (grid if adjoint else coarse_grid(grid, pair, boundary)).check(x.shape[2])
    return tokens_first(torch_attention.coarse_outputs(x, grid, pair, boundary, adjoint))


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
    return _resized(x, height, width, stride, boundary, coarser=adjoint)


def _coarse_outputs_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return coarse_outputs(grad, *ctx.arguments, not ctx.adjoint), *(None,) * 6


def _resized(
    x: torch.Tensor, height: int, width: int, stride: Sequence[int], boundary: str, *, coarser: bool
) -> torch.Tensor:
    """An empty tensor with the coarse grid's tokens for the grid's, or the other way round."""
    batch, heads, tokens, dim = x.shape
    change = height * width - point_count(height, stride[0], boundary) * point_count(width, stride[1], boundary)
    return x.new_empty(batch, tokens - change if coarser else tokens + change, heads, dim).transpose(1, 2)


coarse_queries.register_autograd(_coarse_queries_gradient, setup_context=linear_context)
coarse_outputs.register_autograd(_coarse_outputs_gradient, setup_context=linear_context)
