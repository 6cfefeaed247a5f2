# SPDX-License-Identifier: Apache-2.0
"""Blur matrices of a batch on its device: which sample has which, and how far they reach.

They are made once per (sigmas, grid, boundary, device) and kept (``core/bounded_cache.py``), so that a call copies
nothing from the host.

Half precision has a matrix in two planes, whose sum is the float32 weights: the weights rounded to the dtype, and what
is left of them, rounded too. Matrix instructions of the dtype then multiply weights of twice its digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch

from segkern.core.bounded_cache import bounded_cache
from segkern.core.gaussian import blur_matrix, blur_reach


class Unblurred(IntEnum):
    """Stands where a blurred sample has the index of its blur."""

    PLAIN = -1  # the sample's queries are taken as they are
    OUTSIDE = -2  # only the sample's tokens outside the grid are wanted
    MEAN = -3  # all image tokens have the first of the means of queries; less: the second, and so on


PLANE_STEP = 64
PLANE_SCALE = {torch.float16: 2.0**14, torch.bfloat16: 1.0}  # of weights, so that both planes' stay normal numbers


@dataclass(frozen=True)
class BlurMatrices:
    """Blur matrices of some samples of a batch; all tensors on one device.

    Attributes:
        samples: int32 ``[S]``, indices into the batch.
        index: int32 ``[S]``, the matrix of each of them, or ``Unblurred``.
        rows: float32 ``[T, height, height]``, or planes ``[T, 2, n, n]`` with n the height padded by zero weights to a
            multiple of ``PLANE_STEP``.
        columns: the same of the width.
        reach: int32 ``[T, 2]``, tokens that a blurred token looks up and down, left and right.
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
    """Matrices for ``samples``, whose sigmas are given in the same order.

    Args:
        adjoint: use transposed matrices.
        planes: half precision that matrices are given in, see above.
    """
    distinct = sorted({sigma for sigma in sigmas if sigma > 0.0})
    index = {sigma: number for number, sigma in enumerate(distinct)}
    matrices = [[blur_matrix(n, sigma, boundary) for sigma in distinct] for n in (height, width)]
    if adjoint:
        matrices = [[matrix.T for matrix in axis] for axis in matrices]
        reach = [[height, width] for _ in distinct]  # the edge row of a transposed reflection looks further
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
    """Integers as an int32 tensor on a device, made once."""
    return torch.tensor(values, dtype=torch.int32, device="cpu").to(device)


@lru_cache(maxsize=1024)
def consecutive(samples: tuple[int, ...]) -> tuple[slice, ...]:
    """Rising sample indices as slices of the batch.

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
