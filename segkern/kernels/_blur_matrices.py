# SPDX-License-Identifier: Apache-2.0
"""Blur matrices of a batch on its device: the matrix of each sample, and its reach.

The matrices are made once per (sigmas, grid, boundary, device) and cached (``core/bounded_cache.py``), so a call copies
nothing from the host.

In half precision, a matrix has two planes that sum to the float32 weights: the weights rounded to the dtype, and the
rounded remainder. The matrix instructions of the dtype then multiply weights of twice its precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch

from segkern.core.bounded_cache import bounded_cache
from segkern.core.gaussian import blur_matrix, blur_reach


class Unblurred(IntEnum):
    """Values of ``BlurMatrices.index`` for samples that are not blurred."""

    PLAIN = -1  # use the sample's queries as they are
    OUTSIDE = -2  # compute only the sample's tokens outside the grid
    MEAN = -3  # all image tokens use the first mean query; lower values are the second mean, and so on


PLANE_STEP = 64
PLANE_SCALE = {torch.float16: 2.0**14, torch.bfloat16: 1.0}  # factor of the weights that keeps both planes normal


@dataclass(frozen=True)
class BlurMatrices:
    """Blur matrices of some samples of a batch. All tensors are on one device.

    Attributes:
        samples: int32 ``[S]``, indices into the batch.
        index: int32 ``[S]``, the matrix of each sample, or a value of ``Unblurred``.
        rows: float32 ``[T, height, height]``, or planes ``[T, 2, n, n]`` where n is the height padded with zero
            weights to a multiple of ``PLANE_STEP``.
        columns: Like ``rows``, for the width.
        reach: int32 ``[T, 2]``, maximum vertical and horizontal distance of the tokens that a blurred token depends on.
    """

    samples: torch.Tensor
    index: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    reach: torch.Tensor


@bounded_cache(most=64)
def blur_matrices(
    samples: tuple[int, ...],
    sigmas: tuple[float, ...],
    height: int,
    width: int,
    boundary: str,
    device: torch.device,
    adjoint: bool = False,
    planes: torch.dtype | None = None,
) -> BlurMatrices:
    """Return the matrices for ``samples``, whose sigmas are given in the same order.

    Args:
        adjoint: Whether to use transposed matrices.
        planes: Half-precision dtype of the planes, or None for float32 matrices; see the module docstring.
    """
    distinct = sorted({sigma for sigma in sigmas if sigma > 0.0})
    index = {sigma: number for number, sigma in enumerate(distinct)}
    matrices = [[blur_matrix(n, sigma, boundary) for sigma in distinct] for n in (height, width)]
    if adjoint:
        matrices = [[matrix.T for matrix in axis] for axis in matrices]
        reach = [[height, width] for _ in distinct]  # the edge row of a transposed reflection reaches further
    else:
        reach = [[blur_reach(sigma, n, boundary) for n in (height, width)] for sigma in distinct]
    return BlurMatrices(
        samples=index_tensor(samples, device),
        index=index_tensor(tuple(index.get(sigma, Unblurred.PLAIN.value) for sigma in sigmas), device),
        rows=_stack(matrices[0], height, planes).to(device),
        columns=_stack(matrices[1], width, planes).to(device),
        reach=torch.tensor(reach, dtype=torch.int32, device="cpu").reshape(-1, 2).to(device),
    )


@bounded_cache(most=4096)
def index_tensor(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return integers as an int32 tensor on a device, cached."""
    return torch.tensor(values, dtype=torch.int32, device="cpu").to(device)


@lru_cache(maxsize=1024)
def consecutive(samples: tuple[int, ...]) -> tuple[slice, ...]:
    """Return rising sample indices as slices of the batch.

    Example:
        >>> consecutive((0, 1, 4))
        (slice(0, 2, None), slice(4, 5, None))
    """
    some = set(samples)
    firsts = [i for i in samples if i - 1 not in some]
    lasts = [i for i in samples if i + 1 not in some]
    return tuple(slice(first, last + 1) for first, last in zip(firsts, lasts, strict=True))


def _stack(matrices: list[torch.Tensor], length: int, planes: torch.dtype | None) -> torch.Tensor:
    count = len(matrices)
    weights = torch.stack(matrices) if matrices else torch.zeros(0, length, length, dtype=torch.float32, device="cpu")
    if planes is None:
        return weights.contiguous()
    size = -(-length // PLANE_STEP) * PLANE_STEP
    padded = torch.zeros(count, 2, size, size, dtype=planes, device="cpu")
    weights = weights * PLANE_SCALE[planes]
    padded[:, 0, :length, :length] = weights
    padded[:, 1, :length, :length] = weights - padded[:, 0, :length, :length].to(torch.float32)
    return padded
