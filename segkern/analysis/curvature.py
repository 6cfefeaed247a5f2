# SPDX-License-Identifier: Apache-2.0
"""The blur's factor in the curvature of the energy, and exact Hessians of small grids; see :mod:`segkern.energy`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from segkern.analysis.logits import Over, blurred_image, check_arguments
from segkern.core.gaussian import blur_matrix
from segkern.grid import Grid

EXACT_LIMIT = 1024  # maximum number of rows of an exact Hessian


def _axis_matrices(grid: Grid, sigma: float, boundary: str) -> list[torch.Tensor]:
    """Return the blur matrix of each axis, height first."""
    return [blur_matrix(n, sigma, boundary, dtype=torch.float64) for n in (grid.height, grid.width)]


def log_diagonal(grid: Grid, sigma: float, boundary: str = "reflect") -> float:
    """Return ``sum_i log b_ii`` over the grid's tokens: the blur's factor in SEG's proof of Theorem 3.1.

    Example:
        >>> log_diagonal(Grid(4, 4), math.inf) == 16 * math.log(1 / 16)
        True
    """
    rows, columns = _axis_matrices(grid, sigma, boundary)
    return (grid.width * rows.diagonal().log().sum() + grid.height * columns.diagonal().log().sum()).item()


def log_determinant(grid: Grid, sigma: float, boundary: str = "reflect") -> float:
    """Return ``log |det B|`` of the blur over the grid, which is minus infinity for infinite sigma (the mean query).

    ``B`` is the Kronecker product of its axes' matrices, so ``det B = det(B_h)^width det(B_w)^height``.

    Example:
        >>> log_determinant(Grid(4, 6), 0.0), log_determinant(Grid(4, 6), math.inf)
        (0.0, -inf)
    """
    if math.isinf(sigma) and grid.tokens > 1:
        return -math.inf  # exact, where slogdet of a singular matrix would return rounding error
    rows, columns = _axis_matrices(grid, sigma, boundary)
    return (grid.width * torch.linalg.slogdet(rows)[1] + grid.height * torch.linalg.slogdet(columns)[1]).item()


def largest_curvature(grid: Grid, sigma: float, boundary: str = "reflect") -> float:
    """Return the largest curvature of the blurred energy of one key, over all logits and directions.

    The second derivative of ``-lse(B a)`` in a direction ``v`` is minus the variance of ``B v`` under the softmax. It
    is at most ``range(B v)^2 / 4`` for any logits ``a``. Over directions of length 1, that is at most
    ``max_ij |B_i - B_j|^2 / 4`` with the rows of ``B``. If ``B`` is invertible, some logits come arbitrarily close to
    this bound. Without a blur, the bound is one half. With a blur, it is never larger, for any boundary. For the mean
    query, it is 0. In this sense a blur always flattens the energy landscape. At given logits, a blur may increase the
    curvature; see :mod:`segkern.energy`.

    Args:
        grid: Grid of the queries.
        sigma: Standard deviation in tokens, or ``math.inf``.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``.

    Returns:
        A number between 0 and one half.

    Example:
        >>> largest_curvature(Grid(8, 8), 0.0), largest_curvature(Grid(8, 8), math.inf)
        (0.5, 0.0)
        >>> largest_curvature(Grid(8, 8), 2.0) < largest_curvature(Grid(8, 8), 1.0) < 0.5
        True
    """
    if grid.tokens == 1:
        return 0.0
    rows, columns = _axis_matrices(grid, sigma, boundary)
    high, wide = rows @ rows.T, columns @ columns.T  # inner products of the axes' rows
    size = torch.outer(high.diagonal(), wide.diagonal())  # |B_i|^2, [height, width]
    largest = 0.0
    for i in range(grid.height):
        for j in range(i, grid.height):
            distance = size[i][:, None] + size[j][None, :] - 2 * high[i, j] * wide
            largest = max(largest, distance.max().item())
    return largest / 4


def curvature_spectrum(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float] = 0.0,
    *,
    over: Over = "queries",
    scale: float | None = None,
    boundary: str = "reflect",
) -> torch.Tensor:
    """Return the eigenvalues of the exact Hessian of the energy with respect to the unblurred logits, for small grids.

    For one key, the Hessian is ``-B^T (diag(p) - p p^T) B`` with the softmax ``p`` of the key's blurred logits. For
    ``over="keys"``, the blur mixes the rows, so there is one matrix over all logits. The Hessian is negative
    semidefinite; the magnitudes of its eigenvalues are returned. One eigenvalue of each vector is 0.

    Args:
        query, key, grid, sigma, over, scale, boundary: See :func:`energies`.

    Returns:
        float64, in descending order: ``[batch, heads, keys, height * width]`` for ``over="queries"``, and
        ``[batch, heads, height * width * keys]`` for ``over="keys"``.

    Raises:
        ValueError: If an argument is invalid, or the Hessian would have more than 1024 rows.

    Source: SEG, Theorem 3.1, without its approximation.

    Example:
        >>> flat = torch.zeros(1, 1, 6, 4)
        >>> [round(value, 3) for value in curvature_spectrum(flat, flat[:, :, :1], Grid(2, 3))[0, 0, 0].tolist()]
        [0.167, 0.167, 0.167, 0.167, 0.167, 0.0]
    """
    query, key, sigmas, scale = check_arguments(query, key, grid, sigma, over, scale, boundary, torch.float64)
    _check_size(grid.tokens * (1 if over == "queries" else key.shape[2]), over, grid, key.shape[2])
    logits = scale * blurred_image(query, grid, sigmas, boundary) @ key.transpose(-2, -1)
    spectra = []  # one per sample and head
    for sample, value in enumerate(sigmas):
        blur = torch.kron(*_axis_matrices(grid, value, boundary)).to(query.device)
        for head in logits[sample]:  # [queries, keys]
            hessians = (
                [_column_hessian(column, blur) for column in head.T]
                if over == "queries"
                else [_rows_hessian(head, blur)]
            )
            spectra.append(torch.stack([torch.linalg.eigvalsh(hessian) for hessian in hessians]))
    shape = query.shape[0], query.shape[1]
    if not spectra:
        size = (key.shape[2], grid.tokens) if over == "queries" else (grid.tokens * key.shape[2],)
        return query.new_empty(*shape, *size)
    largest_first = torch.stack(spectra).flip(-1).clamp_min(0.0).unflatten(0, shape)  # clamps rounding errors below 0
    return largest_first if over == "queries" else largest_first[:, :, 0]


def _column_hessian(logits: torch.Tensor, blur: torch.Tensor) -> torch.Tensor:
    """Return ``B^T (diag(p) - p p^T) B`` with the softmax ``p`` of one key's blurred logits ``[queries]``."""
    p = torch.softmax(logits, dim=-1)
    return blur.T @ (torch.diag(p) - torch.outer(p, p)) @ blur


def _rows_hessian(logits: torch.Tensor, blur: torch.Tensor) -> torch.Tensor:
    """Return the Hessian over all rows of blurred logits ``[queries, keys]``, ``[queries * keys, queries * keys]``."""
    p = torch.softmax(logits, dim=-1)
    of_rows = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # [queries, keys, keys]
    return torch.einsum("ra,rb,rjk->ajbk", blur, blur, of_rows).flatten(2, 3).flatten(0, 1)


def _check_size(side: int, over: Over, grid: Grid, keys: int) -> None:
    """Raise a ValueError for a Hessian that is too large to form."""
    if side <= EXACT_LIMIT:
        return
    logits = f"{grid.height} x {grid.width} = {grid.tokens} queries"
    if over == "keys":
        logits = f"{grid.height} x {grid.width} queries times {keys} keys = {side} logits"
    raise ValueError(
        f"the exact Hessian over {logits} would have {side} rows, but the maximum is {EXACT_LIMIT}; use a smaller "
        f"grid, or log_curvature, which needs no Hessian"
    )
