# SPDX-License-Identifier: Apache-2.0
"""The energy of attention and the effect of blurring its queries, for analysis at any size.

With logits ``A = scale * Q K^T``, the energy of a vector ``a`` of logits is ``E'(a) = -lse(a)``, where lse is the
logarithm of the sum of exponentials. The energy of a layer is the sum over its vectors. ``A`` can be split into vectors
in two ways:

- ``over="keys"``: a vector is a row, the logits of one query, as in the softmax of attention. There is one energy per
  query, so the energies form a map over the grid. SEG's appendix B calls this the dual.
- ``over="queries"``: a vector is a column, the logits of one key, as in SEG's Definition 2.1. The statements of the
  paper are about these vectors: the blur acts within each of them.

A blur ``B`` over the query grid gives ``B A``, the logits of the blurred queries (Proposition 3.1). The weights of the
blur are not negative and its rows sum to 1. Its columns sum to 1 only for the boundaries symmetric and circular. With
these two, the blur keeps the mean of the logits, does not raise their variance (Lemma 3.1) and does not lower a layer's
energy (Lemma 3.2), although it may lower the energy of one row. Energy does not always grow with sigma, because taps
are cut off and clamped. A blur lowers ``|det|`` of the Hessian (Theorem 3.1) only through the blur's own factor, and
only for logits that are not too peaked. For any logits and any boundary, the blur lowers a bound on the curvature,
:func:`largest_curvature`. ``docs/energy.md`` lists the conditions of each statement, and a counterexample that violates
them. ``tests/core/test_theory.py`` and ``test_theory_curvature.py`` test the statements.

Source: SEG, arXiv 2408.00760: Definition 2.1 (equation 5), section 3, appendices A and B.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from segkern.analysis.curvature import curvature_spectrum, largest_curvature, log_determinant, log_diagonal
from segkern.analysis.logits import Moments, Over, blurred_image, check_arguments, logit_moments
from segkern.api import attention_energy
from segkern.core.precision import full_precision
from segkern.core.sigmas import check_sigma
from segkern.grid import Grid

__all__ = [
    "Moments",
    "OverSigma",
    "curvature_spectrum",
    "energies",
    "largest_curvature",
    "layer_energy",
    "log_curvature",
    "logit_moments",
    "over_sigma",
]

Factor = Literal["none", "paper", "chain"]


def energies(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float] = 0.0,
    *,
    over: Over = "keys",
    scale: float | None = None,
    boundary: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return ``-lse`` of each image query's logits (``over="keys"``) or each key's (``over="queries"``), in nats.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, as passed to attention: after QK-norm and rotary embedding.
        key: ``[batch, heads, keys, head_dim]``.
        grid: Position of the image in the query tokens. Queries outside it are ignored.
        sigma: Standard deviation of the blur in tokens, one number or one per sample; 0 is no blur, ``math.inf`` the
            mean query.
        over: The axis of the log-sum-exp; see :mod:`segkern.energy`.
        scale: Factor of the logits; ``1 / sqrt(head_dim)`` by default.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``. Only the last two keep the mean of the logits.
        dtype: Dtype of the computation and the result, ``torch.float32`` or ``torch.float64``.

    Returns:
        ``[batch, heads, height * width]`` in row-major order for ``over="keys"``, ``[batch, heads, keys]`` for
        ``over="queries"``.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: SEG, Definition 2.1 (``over="queries"``), and its dual in appendix B (``over="keys"``).

    Example:
        >>> q, k = torch.randn(2, 1, 8, 6 * 9, 16)
        >>> energies(q, k, Grid(6, 9), sigma=2.0).shape
        torch.Size([1, 8, 54])
        >>> sharp, flat = (energies(q, k, Grid(6, 9), s, boundary="symmetric").sum() for s in (0.0, math.inf))
        >>> bool(flat > sharp)
        True
    """
    query, key, sigmas, scale = check_arguments(query, key, grid, sigma, over, scale, boundary, dtype)
    with full_precision(query.device):
        if over == "queries":
            return attention_energy(key, blurred_image(query, grid, sigmas, boundary), scale=scale)
        rows = attention_energy(query, key, grid, sigmas, scale=scale, boundary=boundary)
    return rows[:, :, grid.start : grid.stop]


def layer_energy(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float] = 0.0,
    *,
    over: Over = "keys",
    scale: float | None = None,
    boundary: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the energy of a layer, ``[batch, heads]`` in nats: the sum of :func:`energies` with the same arguments.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: SEG, equation 5.

    Example:
        >>> flat = torch.zeros(1, 1, 6, 4)
        >>> round(layer_energy(flat, flat, Grid(2, 3)).item() / -math.log(6), 5)
        6.0
    """
    return energies(query, key, grid, sigma, over=over, scale=scale, boundary=boundary, dtype=dtype).sum(dim=-1)


def log_curvature(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float] = 0.0,
    *,
    over: Over = "queries",
    factor: Factor = "paper",
    scale: float | None = None,
    boundary: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return ``log |det|`` of the Hessian of the layer's energy over its logits, with one logit per vector held fixed.

    The Hessian is negative semidefinite, so the sign of the determinant is ``(-1)`` to the number of free logits. If no
    logit is held fixed, the determinant is 0. The same value results from the whole Hessian if ``p p^T`` is dropped,
    which is the paper's approximation. For an unblurred vector of n logits, the product of the nonzero eigenvalues is n
    times its determinant. The value is ``sum(logits) + n * energy``, plus the blur's part:

    - ``factor="none"``: nothing. The curvature of E' at the blurred logits, with respect to the blurred logits.
    - ``"paper"``: ``log b_ii`` for each logit, equation 20 of the proof.
    - ``"chain"``: ``2 log |det B|`` for each free key, with respect to the logits before the blur. This is exact (chain
      rule), and minus infinity for the mean query.

    Args:
        query, key, grid, sigma, over, scale, boundary, dtype: See :func:`energies`; but ``over="queries"`` by default,
            as in the paper.
        factor: The blur's part, see above. Without a blur, all three give the same value.

    Returns:
        ``[batch, heads]``, natural logarithm, summed over all vectors of the layer. Divide it by the number of logits
        for the geometric mean.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: SEG, Theorem 3.1 and appendix A.3. Its conclusion, that a blur lowers the determinant, holds for logits that
    are not too peaked. The proof claims the same for ``"none"``, which is wrong; see :mod:`segkern.energy`.

    Example:
        >>> q, k = torch.randn(2, 1, 1, 4 * 4, 8)
        >>> options = {"boundary": "circular"}
        >>> before = log_curvature(q, k, Grid(4, 4), **options)
        >>> after = {f: log_curvature(q, k, Grid(4, 4), 1.0, factor=f, **options) for f in ("none", "paper", "chain")}
        >>> bool(after["none"] > before), bool(after["paper"] < before), bool(after["chain"] < before)
        (True, True, True)
    """
    if factor not in get_args(Factor):
        raise ValueError(f"factor must be one of {', '.join(map(repr, get_args(Factor)))}, got {factor!r}")
    options: dict[str, Any] = {"scale": scale, "boundary": boundary, "dtype": dtype}
    sigmas = check_arguments(query, key, grid, sigma, over, scale, boundary, dtype)[2]
    energy = layer_energy(query, key, grid, sigmas, over=over, **options)
    mean = logit_moments(query, key, grid, sigmas, **options).mean
    return _log_determinant(energy, mean, grid, key.shape[2], sigmas, over, factor, boundary)


@dataclass(frozen=True)
class OverSigma:
    """The result of :func:`over_sigma`. Every tensor except ``energies`` is ``[sigmas, batch, heads]``.

    Attributes:
        sigmas: Sigmas in tokens.
        energies: Energy of each vector, ``[sigmas, batch, heads, vectors]``, in nats.
        energy: Energy of the layer, the sum of ``energies``.
        mean: Mean of all logits.
        variance: Variance of all logits.
        query_variance: Variance of one key's logits over the queries, the subject of Lemma 3.1; mean over the keys.
        log_curvature: Log-curvature by factor, ``"none"``, ``"paper"`` and ``"chain"``.
    """

    sigmas: tuple[float, ...]
    energies: torch.Tensor
    energy: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    query_variance: torch.Tensor
    log_curvature: dict[Factor, torch.Tensor]


def over_sigma(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    sigmas: Sequence[float],
    *,
    over: Over = "keys",
    scale: float | None = None,
    boundary: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> OverSigma:
    """Return energy, moments and curvature at several sigmas, each applied to the whole batch.

    Args:
        query, key, grid, over, scale, boundary, dtype: See :func:`energies`.
        sigmas: At least one sigma; 0 is no blur.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Example:
        >>> q, k = torch.randn(2, 1, 8, 6 * 9, 16)
        >>> result = over_sigma(q, k, Grid(6, 9), (0.0, 2.0, math.inf))
        >>> result.energy.shape, result.energies.shape
        (torch.Size([3, 1, 8]), torch.Size([3, 1, 8, 54]))
    """
    values = check_sigma(tuple(sigmas), len(tuple(sigmas)))
    if not values:
        raise ValueError(f"over_sigma needs at least one sigma, got {sigmas!r}")
    options: dict[str, Any] = {"scale": scale, "boundary": boundary, "dtype": dtype}
    curvature: dict[Factor, list[torch.Tensor]] = {factor: [] for factor in get_args(Factor)}
    vectors, moments, query_variances = [], [], []
    for sigma in values:
        vectors.append(energies(query, key, grid, sigma, over=over, **options))
        moments.append(logit_moments(query, key, grid, sigma, **options))
        per_key = logit_moments(query, key, grid, sigma, per_key=True, **options)
        query_variances.append(per_key.variance.mean(dim=-1))
        layer, mean, batch_sigmas = vectors[-1].sum(dim=-1), moments[-1].mean, (sigma,) * query.shape[0]
        for factor, determinants in curvature.items():
            determinants.append(_log_determinant(layer, mean, grid, key.shape[2], batch_sigmas, over, factor, boundary))
    return OverSigma(
        sigmas=values,
        energies=torch.stack(vectors),
        energy=torch.stack(vectors).sum(dim=-1),
        mean=torch.stack([at_sigma.mean for at_sigma in moments]),
        variance=torch.stack([at_sigma.variance for at_sigma in moments]),
        query_variance=torch.stack(query_variances),
        log_curvature={factor: torch.stack(determinants) for factor, determinants in curvature.items()},
    )


def _log_determinant(
    energy: torch.Tensor,
    mean: torch.Tensor,
    grid: Grid,
    keys: int,
    sigmas: tuple[float, ...],
    over: Over,
    factor: Factor,
    boundary: str,
) -> torch.Tensor:
    """Return :func:`log_curvature` of a layer from its energy and mean logit ``[batch, heads]``."""
    without_blur = mean * (grid.tokens * keys) + energy * (grid.tokens if over == "queries" else keys)
    free = keys if over == "queries" else keys - 1
    blur_parts = [_blur_part(grid, sigma, boundary, factor, keys, free) for sigma in sigmas]
    return without_blur + without_blur.new_tensor(blur_parts)[:, None]


def _blur_part(grid: Grid, sigma: float, boundary: str, factor: Factor, keys: int, free: int) -> float:
    """Return the blur's part of the log-determinant, for ``keys`` keys of which ``free`` are free."""
    if factor == "paper":
        return keys * log_diagonal(grid, sigma, boundary)
    return 2 * free * log_determinant(grid, sigma, boundary) if factor == "chain" and free else 0.0
