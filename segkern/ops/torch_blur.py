# SPDX-License-Identifier: Apache-2.0
"""The blur in PyTorch: a matrix product per axis, or the mean for infinite sigma. All operations are differentiable."""

from __future__ import annotations

import math

import torch

from segkern.core.gaussian import cached_blur_matrix
from segkern.core.precision import compute_dtype, exact_dtype, full_precision
from segkern.core.sigmas import equal_runs, is_finite_blur
from segkern.core.tracing import own_result
from segkern.grid import Grid


def grid_mean(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the mean token of the image, ``[batch, heads, 1, dim]`` in the input's dtype."""
    image = x[:, :, grid.start : grid.stop]
    return image.mean(dim=2, keepdim=True, dtype=compute_dtype(x.dtype)).to(x.dtype)


def _mix_image(image: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Apply a matrix to each axis of ``[batch, heads, height * width, dim]``: ``rows`` to height, ``columns`` to width.

    Works on a channels-last view ``[batch, height, width, heads * dim]`` if the layout allows it, so each axis is one
    matrix product over long contiguous rows: first over the width, then over the height.
    """
    batch, heads, _, dim = image.shape
    (new_height, height), (new_width, width) = rows.shape, columns.shape
    x = image.transpose(1, 2).to(rows.dtype)  # [batch, tokens, heads, dim]
    x = x.reshape(batch * height, width, heads * dim)
    with full_precision(image.device):
        x = torch.matmul(columns, x)  # [batch * height, new_width, heads * dim]
        x = x.view(batch, height, new_width * heads * dim)
        x = torch.matmul(rows, x)  # [batch, new_height, new_width * heads * dim]
    return own_result(x.view(batch, new_height * new_width, heads, dim).transpose(1, 2)).to(image.dtype)


def mix_axes(x: torch.Tensor, grid: Grid, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Apply a matrix to each axis of the grid's tokens. Tokens outside the grid are unchanged."""
    image = _mix_image(x[:, :, grid.start : grid.stop], rows, columns)
    if grid.tokens == x.shape[2]:
        return image
    return join([x[:, :, : grid.start], image, x[:, :, grid.stop :]], dim=2)


def _blur_run(x: torch.Tensor, grid: Grid, sigma: float, boundary: str, adjoint: bool = False) -> torch.Tensor:
    """Blur consecutive samples of one positive sigma. Tokens outside the grid are unchanged."""
    if not math.isinf(sigma):
        dtype, device = exact_dtype(x), x.device
        rows = cached_blur_matrix(grid.height, sigma, boundary, dtype=dtype, device=device)
        columns = cached_blur_matrix(grid.width, sigma, boundary, dtype=dtype, device=device)
        if adjoint:
            rows, columns = rows.T, columns.T
        return mix_axes(x, grid, rows, columns)
    image = grid_mean(x, grid).expand(-1, -1, grid.tokens, -1)  # the mean over the grid is its own adjoint
    if grid.tokens == x.shape[2]:
        return image
    return torch.cat([x[:, :, : grid.start], image, x[:, :, grid.stop :]], dim=2)


def gaussian_blur(
    x: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], boundary: str, adjoint: bool = False
) -> torch.Tensor:
    """Blur ``[batch, heads, tokens, dim]``, one sigma per sample; ``adjoint`` applies the transposed blur."""
    if not any(sigmas):  # includes an empty batch
        return x.clone(memory_format=torch.contiguous_format)
    parts = [
        x[samples] if sigma == 0.0 else _blur_run(x[samples], grid, sigma, boundary, adjoint)
        for samples, sigma in equal_runs(sigmas)
    ]
    if len(parts) > 1:
        return join(parts, dim=0)
    # The result for infinite sigma is an expanded row, which must be copied.
    return parts[0] if is_finite_blur(sigmas[0]) else parts[0].clone(memory_format=torch.contiguous_format)


def join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate ``[batch, heads, tokens, dim]`` parts, keeping attention's tokens-before-heads memory order."""
    swapped = {0: 0, 2: 1}[dim]
    return own_result(torch.cat([part.transpose(1, 2) for part in parts], dim=swapped).transpose(1, 2))
