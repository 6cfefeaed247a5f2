# SPDX-License-Identifier: Apache-2.0
"""What a computation costs, counted, and how long a device's peak rates would take for it.

Counted is what the algorithm asks for, not what an implementation does: a multiply-add is two FLOPs, every tensor moves
once between memory and the chip, what a fused kernel keeps on the chip does not move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.cases import Case
from segkern.core.coarse_queries import coarse_grid
from segkern.core.gaussian import tap_count


@dataclass(frozen=True)
class Work:
    """FLOPs of products, exponentials of the softmax, bytes between memory and the chip."""

    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.exps + other.exps, self.bytes + other.bytes)


def attention(case: Case, sigma: float = 0.0) -> Work:
    """Attention of every query row: 4 N^2 D FLOPs a head; queries, keys, values and outputs move."""
    return _rows(case, case.batch * case.tokens)


def masses(case: Case, sigma: float = 0.0, *, passes: int = 2) -> Work:
    """Masses of all keys: a product and an exponential per score and pass; queries and keys move, and little else."""
    scores = float(passes * case.batch * case.heads * case.tokens**2)
    moved = 2.0 * passes * case.batch * case.tokens * _row_bytes(case)
    return Work(2.0 * scores * case.head_dim, scores, moved + 4.0 * case.batch * case.heads * case.tokens)


def attention_of_points(case: Case, points: int) -> Work:
    """Attention where the blurred samples have so many rows for their grid; all outputs are written."""
    outside = case.tokens - case.grid.tokens
    rows = (case.batch - case.third) * case.tokens + case.third * (outside + points)
    written = case.batch * case.tokens - rows
    return _rows(case, rows) + Work(bytes=written * _row_bytes(case))


def one_row(case: Case, sigma: float) -> Work:
    """Attention at infinite sigma: one row for the grid, once the queries are read for their mean."""
    return attention_of_points(case, 1) + Work(bytes=case.third * case.grid.tokens * _row_bytes(case))


def coarse(stride: int, case: Case, sigma: float) -> Work:
    """Attention at the points of a coarse grid, and the small matrices to it and back."""
    grid, small = case.grid, coarse_grid(case.grid, (stride, stride), "reflect")
    channels = case.third * case.heads * case.head_dim
    there = grid.height * small.width * grid.width + small.height * grid.height * small.width
    back = grid.width * small.height * small.width + grid.height * small.height * grid.width
    moved = Work(flops=2.0 * channels * (there + back), bytes=2.0 * case.third * grid.tokens * _row_bytes(case))
    return attention_of_points(case, small.tokens) + moved


def separable_blur(case: Case, sigma: float, *, banded: bool = True, moves: bool = True) -> Work:
    """The blur of a third of the queries, one axis after the other; ``banded`` skips what is out of reach."""
    if sigma == 0.0:
        return Work()
    grid = case.grid
    axes = (grid.height, grid.width)
    if not banded:
        terms = float(sum(axes))
    elif math.isinf(sigma):
        terms = 0.5  # a mean adds every token once
    else:
        terms = float(sum(min(n, tap_count(sigma, n)) for n in axes))
    flops = 2.0 * case.third * grid.tokens * case.heads * case.head_dim * terms
    return Work(flops, bytes=2.0 * case.third * case.tokens * _row_bytes(case) if moves else 0.0)


def official_blur(case: Case, sigma: float) -> Work:
    """The two-dimensional convolution, whose taps multiply, and the copy of all queries that follows it."""
    grid = case.grid
    taps = 0 if math.isinf(sigma) else tap_count(sigma, grid.height) * tap_count(sigma, grid.width)
    flops = 2.0 * case.third * grid.tokens * case.heads * case.head_dim * taps
    return Work(flops, bytes=2.0 * (case.third + case.batch) * case.tokens * _row_bytes(case))


def dense_blur(case: Case, sigma: float) -> Work:
    """A product with the blur of the whole grid as one matrix, and the copy of all queries that follows it."""
    flops = 2.0 * case.third * case.grid.tokens**2 * case.heads * case.head_dim
    matrix = case.grid.tokens**2 * case.dtype.itemsize
    return Work(flops, bytes=matrix + 2.0 * (case.third + case.batch) * case.tokens * _row_bytes(case))


def logits_bytes(case: Case, sigma: float = 0.0) -> float:
    """Memory for logits and probabilities where an implementation writes them."""
    return 2.0 * case.batch * case.heads * case.tokens**2 * max(4, case.dtype.itemsize)


def _row_bytes(case: Case) -> int:
    """One token of all heads."""
    return case.heads * case.head_dim * case.dtype.itemsize


def _rows(case: Case, rows: int) -> Work:
    scores = float(rows * case.tokens * case.heads)
    moved = 2.0 * (rows + case.batch * case.tokens) * _row_bytes(case)
    return Work(4.0 * scores * case.head_dim, scores, moved)


@dataclass(frozen=True)
class Peaks:
    """Rates that a device cannot exceed, per second, and where they are written.

    ``exps`` is multiprocessors x 16 exponentials a clock x the boost clock at which the matrix rate is stated: the
    throughput table of NVIDIA's CUDA programming guide for compute capability 8.0 and 9.0. None where not known.
    """

    half_flops: float
    float32_flops: float
    bytes: float
    exps: float | None
    source: str


_H100 = "NVIDIA H100 Tensor Core GPU datasheet, SXM5 column, without sparsity; 132 multiprocessors at 1.83 GHz"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet, SXM column, without sparsity; 132 multiprocessors at 1.83 GHz"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM column, without sparsity; 108 multiprocessors at 1.41 GHz"
_MI300X = "AMD Instinct MI300X data sheet, without sparsity; exponentials not stated there"

# By the name that torch.cuda.get_device_name gives; every other device has no roofline.
PEAKS = {
    "NVIDIA H100 80GB HBM3": Peaks(989.4e12, 66.9e12, 3.35e12, 132 * 16 * 1.83e9, _H100),
    "NVIDIA H200": Peaks(989.4e12, 66.9e12, 4.8e12, 132 * 16 * 1.83e9, _H200),
    "NVIDIA A100-SXM4-80GB": Peaks(312e12, 19.5e12, 2.039e12, 108 * 16 * 1.41e9, _A100),
    "AMD Instinct MI300X": Peaks(1307.4e12, 163.4e12, 5.3e12, None, _MI300X),
}


def limits(work: Work, peaks: Peaks, dtype: str) -> dict[str, float]:
    """Milliseconds that each of the device's units would need at its peak; the longest is the limit.

    Example:
        >>> peaks = Peaks(100e12, 10e12, 1e12, 5e12, "")
        >>> limits(Work(flops=1e12, exps=1e10, bytes=1e9), peaks, "float16")
        {'products': 10.0, 'memory': 1.0, 'exponentials': 2.0}
    """
    flops = peaks.float32_flops if dtype == "float32" else peaks.half_flops
    found = {"products": work.flops / flops, "memory": work.bytes / peaks.bytes}
    if peaks.exps is not None:
        found["exponentials"] = work.exps / peaks.exps
    return {name: seconds * 1e3 for name, seconds in found.items()}
