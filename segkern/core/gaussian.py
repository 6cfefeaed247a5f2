# SPDX-License-Identifier: Apache-2.0
"""The Gaussian blur of one axis: taps, the ``[n, n]`` matrix, boundaries.

All rules about the Gaussian are defined here. The blur of a grid is separable: with ``B_h`` and ``B_w`` from
:func:`blur_matrix`, ``blurred[i, j] = sum_{k, l} B_h[i, k] B_w[j, l] x[k, l]``.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from segkern.core.bounded_cache import bounded_cache
from segkern.core.sigmas import check_sigma

Boundary = Literal["reflect", "symmetric", "circular"]
BOUNDARIES: tuple[str, ...] = get_args(Boundary)


def tap_count(sigma: float, length: int) -> int:
    """Return the number of taps of a finite ``sigma`` on an axis of ``length`` tokens: odd, about ``6 sigma``, clamped.

    Source: the kernel size of the official implementation, ``ceil(6 sigma)`` made odd. It is clamped on each axis
    separately to the largest odd number that reflect padding allows.

    Example:
        >>> [tap_count(1.0, 64), tap_count(10.0, 64), tap_count(100.0, 64), tap_count(100.0, 33)]
        [7, 61, 65, 33]
    """
    reach = math.ceil(min(6.0 * sigma, 2.0 * length + 2.0))  # the exact number is irrelevant beyond the clamp
    return min(reach + 1 - reach % 2, length - (length % 2 - 1))


def gaussian_taps(sigma: float, length: int, count: int | None = None) -> torch.Tensor:
    """Return the normalised taps of a finite positive ``sigma``, float64 ``[tap_count(sigma, length)]`` or ``[count]``.

    Example:
        >>> round(gaussian_taps(1.0, 64).sum().item(), 12)
        1.0
    """
    radius = (tap_count(sigma, length) if count is None else count) // 2
    # The largest exponent is 0 (at x = 0), so a tiny sigma gives (0, 1, 0), not 0 / 0.
    scaled = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu") / sigma
    weights = torch.exp(-0.5 * scaled * scaled)
    return weights / weights.sum()


def blur_reach(sigma: float, length: int, boundary: str) -> int:
    """Return the maximum distance of the tokens that a blurred token depends on; ``length`` for the whole axis."""
    if sigma == 0.0:
        return 0
    if math.isinf(sigma) or boundary == "circular":
        return length
    return tap_count(sigma, length) // 2


def _fold(index: torch.Tensor, length: int, boundary: str) -> torch.Tensor:
    """Map positions at most ``length`` outside ``0 .. length-1`` to the token that the boundary places there."""
    if boundary == "circular":
        return index % length
    edge = 1 if boundary == "symmetric" else 0  # symmetric repeats the edge token, reflect does not
    index = torch.where(index < 0, -index - edge, index)
    return torch.where(index >= length, 2 * (length - 1) + edge - index, index)


def blur_matrix(
    length: int,
    sigma: float,
    boundary: str = "reflect",
    *,
    taps: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the blur of one axis as a matrix: ``blurred = matrix @ x`` for ``x`` of shape ``[length, ...]``.

    Args:
        length: Number of tokens on the axis.
        sigma: Standard deviation in tokens; 0 is the identity, ``math.inf`` the mean of the axis.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``. The last two keep the mean exactly.
        taps: Odd number of taps for a finite, positive sigma, instead of :func:`tap_count`.
        dtype: Dtype of the result. Weights are computed in float64 and rounded once.
        device: Device of the result.

    Returns:
        ``[length, length]``. Every row sums to 1.

    Raises:
        ValueError: If sigma is negative or NaN, the boundary is unknown, or ``taps`` extend further beyond the edges
            than the boundary has tokens.

    Example:
        >>> torch.allclose(blur_matrix(5, 1.0).sum(dim=1), torch.ones(5))
        True
    """
    (sigma,) = check_sigma(sigma, 1)
    check_boundary(boundary)
    if sigma == 0.0:
        return torch.eye(length, dtype=dtype, device=device)
    if math.isinf(sigma):
        return torch.full((length, length), 1.0 / length, dtype=dtype, device=device)
    weights = gaussian_taps(sigma, length, taps)
    radius = weights.numel() // 2
    if radius > length - (boundary == "reflect"):
        raise ValueError(f"{taps} taps are too many for {boundary!r} on an axis of {length} tokens")
    rows = torch.arange(length, device="cpu")[:, None]
    columns = _fold(rows + torch.arange(-radius, radius + 1, device="cpu")[None, :], length, boundary)
    matrix = torch.zeros(length, length, dtype=torch.float64, device="cpu")
    matrix.scatter_add_(1, columns, weights.expand(length, -1))
    return matrix.to(device=device, dtype=dtype)


cached_blur_matrix = bounded_cache(most=64)(blur_matrix)


def check_boundary(boundary: str) -> None:
    """Raise a ValueError for an unknown boundary."""
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary must be one of {', '.join(map(repr, BOUNDARIES))}, got {boundary!r}")
