# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of blurred logits (without forming the logits), and argument checks of this package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch

from segkern.core.arguments import check_grid, check_qk, check_scale, check_tensor, scale_of
from segkern.core.gaussian import check_boundary
from segkern.core.precision import exact_dtype, full_precision
from segkern.core.sigmas import check_sigma
from segkern.core.tracing import fixed_numbers
from segkern.grid import Grid
from segkern.ops.torch_blur import gaussian_blur

Over = Literal["keys", "queries"]


class Moments(NamedTuple):
    """Mean and variance of logits.

    Attributes:
        mean: Mean, ``[batch, heads]``, or ``[batch, heads, keys]`` for each key separately.
        variance: Variance, same shape, divided by the number of logits (no Bessel's correction).
    """

    mean: torch.Tensor
    variance: torch.Tensor


def logit_moments(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float] = 0.0,
    *,
    per_key: bool = False,
    scale: float | None = None,
    boundary: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> Moments:
    """Return mean and variance of the blurred logits of the image's queries, without forming the logits.

    Let ``C_q`` and ``C_k`` be the covariances of queries and keys. The mean is ``q^T k`` of the mean query and key. The
    variance of one key's logits over the queries is ``k^T C_q k``. The variance of all logits is the mean of
    ``q^T C_k q`` plus ``k^T C_q k`` of the mean key. No squares are subtracted, so small variances stay accurate.

    Args:
        query, key, grid, sigma, scale, boundary, dtype: See :func:`energies`.
        per_key: Whether to return the moments of each key's logits over the queries (the subject of Lemma 3.1) instead
            of the moments of all logits.

    Returns:
        Mean and variance, ``[batch, heads]``, or with ``per_key`` ``[batch, heads, keys]``, in ``dtype``.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: SEG, Lemma 3.1.

    Example:
        >>> q, k = torch.randn(2, 1, 8, 6 * 9, 16).double()
        >>> options = {"boundary": "circular", "dtype": torch.float64}
        >>> sharp, blurred = (logit_moments(q, k, Grid(6, 9), sigma, **options) for sigma in (0.0, 2.0))
        >>> torch.allclose(sharp.mean, blurred.mean), bool((blurred.variance < sharp.variance).all())
        (True, True)
    """
    query, key, sigmas, scale = check_arguments(query, key, grid, sigma, "keys", scale, boundary, dtype)
    exact = exact_dtype(query)
    image, key = blurred_image(query, grid, sigmas, boundary).to(exact), key.to(exact)
    with full_precision(query.device):
        query_mean, key_mean = image.mean(dim=2, keepdim=True), key.mean(dim=2, keepdim=True)
        over_queries = _covariance(image - query_mean)
        if per_key:
            mean = (key @ query_mean.transpose(-2, -1))[..., 0]
            variance = _form(over_queries, key)
        else:
            mean = (query_mean * key_mean).sum(dim=(-2, -1))
            variance = _form(_covariance(key - key_mean), image).mean(dim=-1) + _form(over_queries, key_mean)[..., 0]
    return Moments((scale * mean).to(dtype), (scale * scale * variance.clamp_min(0.0)).to(dtype))


def check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float],
    over: str,
    scale: float | None,
    boundary: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...], float]:
    """Return query and key in ``dtype``, one sigma per sample, and the scale; raise a ValueError for bad arguments."""
    for name, x in (("query", query), ("key", key)):
        check_tensor(name, x)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    query, key = query.to(dtype), key.to(dtype)
    check_qk(query, key)
    check_grid(grid, query.shape[2])
    check_boundary(boundary)
    if over not in get_args(Over):
        raise ValueError(f"over must be one of {', '.join(map(repr, get_args(Over)))}, got {over!r}")
    sigmas = check_sigma(fixed_numbers(sigma), query.shape[0])
    return query, key, sigmas, scale_of(check_scale(fixed_numbers(scale)), query)


def blurred_image(query: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], boundary: str) -> torch.Tensor:
    """Return the blurred queries of the image, ``[batch, heads, height * width, head_dim]``."""
    return gaussian_blur(query, grid, sigmas, boundary)[:, :, grid.start : grid.stop]


def _covariance(centred: torch.Tensor) -> torch.Tensor:
    """Return the covariance ``[..., dim, dim]`` of centred vectors ``[..., count, dim]``."""
    return centred.transpose(-2, -1) @ centred / centred.shape[-2]


def _form(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return ``x^T M x`` for every vector in ``[..., count, dim]``."""
    return ((x @ matrix) * x).sum(dim=-1)
