# SPDX-License-Identifier: Apache-2.0
"""The operators ``segkern::coarse_queries`` and ``segkern::coarse_outputs``: to points between tokens and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkern.core.coarse_queries import coarse_grid, point_count
from segkern.core.gaussian import check_boundary
from segkern.core.sigmas import check_sigma
from segkern.grid import Grid
from segkern.ops import torch_attention
from segkern.ops.operators import empty_output, operator, save_linear, tokens_first


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
    """See :func:`segkern.ops.torch_attention.coarse_queries`."""
    check_boundary(boundary)
    grid, pair = Grid(height, width, start), (stride[0], stride[1])
    (coarse_grid(grid, pair, boundary) if adjoint else grid).check(x.shape[2])
    sigmas = check_sigma(sigma, x.shape[0])
    return tokens_first(torch_attention.coarse_queries(x, grid, sigmas, pair, boundary, adjoint))


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
    more = _saved_tokens(height, width, stride, boundary)
    return empty_output(x, x.shape[3], -more if adjoint else more)


def _coarse_outputs_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return coarse_outputs(grad, *ctx.arguments, not ctx.adjoint), *(None,) * 6


def _saved_tokens(height: int, width: int, stride: Sequence[int], boundary: str) -> int:
    """How many tokens more a grid has than its coarse grid has points."""
    return height * width - point_count(height, stride[0], boundary) * point_count(width, stride[1], boundary)


coarse_queries.register_autograd(_coarse_queries_gradient, setup_context=save_linear)
coarse_outputs.register_autograd(_coarse_outputs_gradient, setup_context=save_linear)
