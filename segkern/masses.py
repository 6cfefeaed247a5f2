# SPDX-License-Identifier: Apache-2.0
"""The public functions of what attention's scores add up to: energies of rows, masses of keys."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from segkern.core.arguments import check_grid, check_qk, check_scale
from segkern.core.dispatch import check_backend, choose_backend
from segkern.core.fallback import FAILURES, give_up
from segkern.core.gaussian import check_boundary, check_sigma
from segkern.core.tracing import autocast_inputs, differentiable_backend, is_plain, is_transformed, is_unseen
from segkern.grid import Grid
from segkern.ops import masses, torch_masses


def attention_mass(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """How much attention each key receives: ``mass[k] = sum over queries of softmax(scale * query key^T)[:, k]``.

    Every query gives away a mass of 1, so that the masses of a head sum to the number of queries, and a key that
    receives as much as all others has ``queries / keys``. The matrix of probabilities is never formed.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, any strides; float16, bfloat16, float32 or float64.
        key: ``[batch, heads, keys, head_dim]`` of the query's dtype; there may be more or fewer keys than queries.
        scale: of the logits; ``1 / sqrt(head_dim)`` by default.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; an explicit choice that cannot run raises its reason.

    Returns:
        float32 ``[batch, heads, keys]``, float64 for float64: products and sums are never rounded to half precision.

    Raises:
        ValueError: when an argument does not fit; the message quotes it.

    Source: Self-Attention Guidance (arXiv 2210.00939), whose mask is where the masses exceed 1.

    Example:
        >>> q, k = torch.randn(2, 2, 8, 26 * 38, 64)
        >>> mass = attention_mass(q, k)
        >>> mass.shape, bool((mass.sum(dim=-1) - 988).abs().max() < 0.01)
        (torch.Size([2, 8, 988]), True)
    """
    query, key = autocast_inputs(check_qk, query, key)
    check_qk(query, key)
    scale = _checked_scale(scale, query)
    chosen = _chosen(backend, "attention_mass", query, key)
    if chosen == "torch" and is_transformed(query, key):
        return torch_masses.composed_mass(query, key, scale)
    if not (is_plain(query, key) and is_unseen(query, key)):
        return masses.attention_mass(query, key, scale, backend if chosen == "triton" else chosen)
    if chosen == "triton":
        try:
            return masses.fused_mass(query, key, scale)
        except FAILURES as error:
            give_up(error, backend, "attention_mass", query)
    return torch_masses.attention_mass(query, key, scale)


def attention_energy(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid | None = None,
    sigma: float | Iterable[float] = 0.0,
    *,
    scale: float | None = None,
    boundary: str = "reflect",
    backend: str = "auto",
) -> torch.Tensor:
    """The energy of each query's row of logits, ``-logsumexp(scale * blur(query) key^T)``, natural logarithm.

    A blur of the queries raises the sum of the energies over the grid, where its boundary keeps the mean: that is what
    Smoothed Energy Guidance is named after; :mod:`segkern.energy` has more of it. It is minus what
    ``seg_attention(..., return_lse=True)`` gives, without values and the work on them.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, any strides; float16, bfloat16, float32 or float64.
        key: ``[batch, heads, keys, head_dim]`` of the query's dtype.
        grid: where the image lies in the query tokens; it may be left out where every sigma is 0.
        sigma: of the blur in tokens, one number or one per sample; 0 is no blur, ``math.inf`` gives every image token
            the energy of the mean query, of which one row is computed.
        scale: of the logits; ``1 / sqrt(head_dim)`` by default.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``; see :func:`segkern.gaussian_blur`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; an explicit choice that cannot run raises its reason.

    Returns:
        float32 ``[batch, heads, tokens]``, float64 for float64. Blurred queries are rounded to their dtype.

    Raises:
        ValueError: when an argument does not fit; the message quotes it.

    Source: SEG (arXiv 2408.00760), section 3: the energy of modern Hopfield networks.

    Example:
        >>> q, k = torch.randn(2, 2, 8, 26 * 38, 64)
        >>> plain, blurred = (attention_energy(q, k, Grid(26, 38), s, boundary="symmetric") for s in (0.0, 2.0))
        >>> plain.shape, bool((blurred.sum(dim=-1) > plain.sum(dim=-1)).all())
        (torch.Size([2, 8, 988]), True)
    """
    query, key = autocast_inputs(check_qk, query, key)
    check_qk(query, key)
    sigmas = check_sigma(sigma, query.shape[0])
    if grid is None and any(sigmas):
        raise ValueError(f"a sigma other than 0 needs a grid, segkern.Grid(height, width), got grid=None, {sigma=}")
    if grid is not None:
        check_grid(grid, query.shape[2])
    check_boundary(boundary)
    scale = _checked_scale(scale, query)
    chosen = _chosen(backend, "attention_energy", query, key)
    if grid is None and query.shape[2] == 0:
        return torch_masses.composed_energy(query, key, Grid(1, 1), sigmas, scale, boundary)
    grid = Grid(1, 1) if grid is None else grid
    if chosen == "torch" and is_transformed(query, key):
        return torch_masses.composed_energy(query, key, grid, sigmas, scale, boundary)
    if not (is_plain(query, key) and is_unseen(query, key)):
        where = (grid.height, grid.width, grid.start)
        asked = backend if chosen == "triton" else chosen
        return masses.attention_energy(query, key, *where, sigmas, scale, boundary, asked)
    if chosen == "triton":
        try:
            return masses.fused_energy(query, key, grid, sigmas, scale, boundary)
        except FAILURES as error:
            give_up(error, backend, "attention_energy", query)
    return torch_masses.attention_energy(query, key, grid, sigmas, scale, boundary)


def _checked_scale(scale: float | None, query: torch.Tensor) -> float:
    return 1.0 / math.sqrt(query.shape[3]) if scale is None else check_scale(scale)


def _chosen(backend: str, operation: str, query: torch.Tensor, key: torch.Tensor) -> str:
    """The backend that serves the call; as asked for where a tracer follows it."""
    check_backend(backend)
    backend = differentiable_backend(backend, query, key)
    if is_plain(query, key):
        backend, _ = choose_backend(query.device, query.dtype, query.shape[3], backend, operation=operation)
    return backend
