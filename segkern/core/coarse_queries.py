# SPDX-License-Identifier: Apache-2.0
"""Coarse queries: blurred queries at a few points of the grid, and interpolation between the points.

A blurred query changes slowly over the grid, so a few points determine the values between them. On an axis of ``n``
tokens, ``m`` points are evenly spaced. A field on the axis is a sum of the waves that remain distinct under the
boundary's padding: cosines for reflect (DCT-I) and symmetric (DCT-II), sines and cosines for circular.
``S = C(points) C(tokens)^-1 B`` evaluates the blurred field at the points, with all the waves that the blur lets
through. ``P`` interpolates ``m`` values to the tokens with the waves that ``m`` points can distinguish. Both are small
matrices of one axis, like the blur, and linear over tokens, so they commute with projections of the channels.
"""

from __future__ import annotations

import math

import torch

from segkern.core.bounded_cache import bounded_cache
from segkern.core.gaussian import blur_matrix, check_boundary
from segkern.core.numbers import whole_number
from segkern.grid import Grid


def check_query_stride(query_stride: int | tuple[int, int]) -> tuple[int, int]:
    """Return the stride of each axis, height first.

    Raises:
        ValueError: If ``query_stride`` is neither an integer of at least 1 nor a pair of them.

    Example:
        >>> check_query_stride(2), check_query_stride((1, 4))
        ((2, 2), (1, 4))
    """
    pair = tuple(query_stride) if isinstance(query_stride, (tuple, list)) else (query_stride, query_stride)
    strides = [whole_number(stride) for stride in pair]
    if len(strides) != 2 or any(stride is None or stride < 1 for stride in strides):
        raise ValueError(
            f"query_stride must be an integer of at least 1, or a pair of them (height, width), got {query_stride!r}"
        )
    height, width = strides
    return int(height), int(width)  # type: ignore[arg-type]


def point_count(length: int, stride: int, boundary: str) -> int:
    """Return the smallest number of points at most ``stride`` tokens apart on an axis of ``length`` tokens.

    With ``"reflect"``, both ends of the axis are points.

    Example:
        >>> [point_count(64, 4, "reflect"), point_count(13, 4, "reflect"), point_count(5, 100, "reflect")]
        [17, 4, 2]
        >>> point_count(64, 4, "symmetric"), point_count(64, 4, "circular"), point_count(1, 4, "reflect")
        (16, 16, 1)
    """
    return -(-(length - 1) // stride) + 1 if boundary == "reflect" else -(-length // stride)


def coarse_grid(grid: Grid, stride: tuple[int, int], boundary: str) -> Grid:
    """Return the points of a grid as a grid that starts at the same token.

    Example:
        >>> coarse_grid(Grid(26, 38, start=77), (4, 4), "reflect")
        Grid(height=8, width=11, start=77)
    """
    height, width = point_count(grid.height, stride[0], boundary), point_count(grid.width, stride[1], boundary)
    return Grid(height, width, grid.start)


def points(length: int, count: int, boundary: str) -> torch.Tensor:
    """Return the positions of the points in tokens, float64 ``[count]``. With ``count == length``, they are the tokens.

    Example:
        >>> points(9, 3, "reflect").tolist(), points(9, 3, "symmetric").tolist(), points(9, 3, "circular").tolist()
        ([0.0, 4.0, 8.0], [1.0, 4.0, 7.0], [0.0, 3.0, 6.0])
    """
    index = torch.arange(count, dtype=torch.float64, device="cpu")
    if boundary == "reflect":
        return index * ((length - 1) / (count - 1)) if count > 1 else index + (length - 1) / 2
    if boundary == "symmetric":
        return (index + 0.5) * (length / count) - 0.5
    return index * (length / count)


def _waves(at: torch.Tensor, count: int, length: int, boundary: str) -> torch.Tensor:
    """Return the ``count`` slowest waves of an axis of ``length`` tokens at these positions, ``[positions, count]``."""
    number = torch.arange(count, dtype=torch.float64, device="cpu")
    if boundary == "reflect":
        return torch.cos(math.pi / max(length - 1, 1) * at[:, None] * number)
    if boundary == "symmetric":
        return torch.cos(math.pi / length * (at[:, None] + 0.5) * number)
    turns = torch.div(number + 1, 2, rounding_mode="floor")  # 0, 1, 1, 2, 2, ...: cosine before sine
    phase = 2 * math.pi / length * at[:, None] * turns
    sine = (number % 2 == 0) & (number > 0)
    return torch.where(sine, torch.sin(phase), torch.cos(phase))


def sampling_matrix(
    length: int,
    sigma: float,
    count: int,
    boundary: str = "reflect",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the matrix from tokens to the blurred field at ``count`` points, ``[count, length]``. Its rows sum to 1.

    The matrix is computed in float64 and rounded once. With as many points as tokens, it is the blur matrix.

    Raises:
        ValueError: If sigma is negative or NaN, the boundary is unknown, or the count is out of range.

    Example:
        >>> sampling_matrix(64, 4.0, 16).shape
        torch.Size([16, 64])
    """
    _check_count(count, length)
    blur = blur_matrix(length, sigma, boundary, dtype=torch.float64)
    if count < length:
        at = points(length, count, boundary)
        waves = torch.linalg.solve(_tokens(length, length, boundary), blur)
        blur = _waves(at, length, length, boundary) @ waves
    return blur.to(device=device, dtype=dtype)


def interpolation_matrix(
    length: int,
    count: int,
    boundary: str = "reflect",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the matrix from values at ``count`` points to the tokens, ``[length, count]``. Its rows sum to 1.

    It is exact for every sum of the ``count`` slowest waves, and the identity if every token is a point. It is computed
    in float64 and rounded once.

    Raises:
        ValueError: If the boundary is unknown or the count is out of range.

    Example:
        >>> torch.allclose(interpolation_matrix(64, 16) @ torch.ones(16), torch.ones(64))
        True
    """
    _check_count(count, length)
    check_boundary(boundary)
    if count == length:
        return torch.eye(length, dtype=dtype, device="cpu").to(device)  # synchronous, because streams share the result
    there = _waves(points(length, count, boundary), count, length, boundary)
    matrix = torch.linalg.solve(there.T, _tokens(length, count, boundary).T).T
    return matrix.to(device=device, dtype=dtype)


def _check_count(count: int, length: int) -> None:
    if not 1 <= count <= length:
        raise ValueError(f"an axis of {length} tokens has 1 to {length} points, got {count}")


def _tokens(length: int, count: int, boundary: str) -> torch.Tensor:
    """Return the slowest waves at the tokens, ``[length, count]``."""
    return _waves(torch.arange(length, dtype=torch.float64, device="cpu"), count, length, boundary)


cached_sampling_matrix = bounded_cache(most=64)(sampling_matrix)
cached_interpolation_matrix = bounded_cache(most=64)(interpolation_matrix)
