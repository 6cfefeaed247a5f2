# SPDX-License-Identifier: Apache-2.0
"""Choice of the kernels of an attention call: where its queries are blurred, and whether its keys are split.

Queries are blurred in the prologue of attention, or by the separable kernel before it. In the prologue, every tile of
queries reads from L2 the source rows within reach of its grid rows, sums them vertically, and distributes the sums over
its tokens. The separable kernel is an additional launch and moves each query a few times. The estimated time of each
way is the sum of its launches, its bytes over the bandwidth of L2, and its instructions over the issue rate. Products
are counted as instructions, and no overlap is assumed. Instructions were counted in code compiled for Hopper; rates are
rounded from published microbenchmarks of the devices. No timings of these kernels are included yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache

import torch

from segkern.core.bounded_cache import bounded_cache
from segkern.core.gaussian import blur_reach
from segkern.grid import Grid
from segkern.kernels._blur_matrices import BlurMatrices, Unblurred, blur_matrices, index_tensor
from segkern.kernels._configs import (
    architecture,
    attention_tile,
    fits_prologue,
    key_splits,
    measured,
    multiprocessors,
    size_class,
)

_MIN_WIDTH_IN_PROLOGUE = 8  # narrower grids waste most of a column block
_LAUNCH_MICROSECONDS = 2.0  # launch of a kernel that waits for the previous one
_L2_BYTES_PER_MICROSECOND = {"sm_80": 4.0e6, "sm_90": 5.5e6, "sm_100": 9.0e6, "gfx942": 1.0e7}
_DEFAULT_BYTES_PER_MICROSECOND = 3.0e6
_INSTRUCTIONS_PER_MICROSECOND = {"sm_80": 6.0e5, "sm_90": 9.0e5, "sm_100": 1.1e6, "gfx942": 1.3e6}  # warp instructions
_DEFAULT_INSTRUCTIONS_PER_MICROSECOND = 5.0e5
_PROLOGUE_WARPS = 8


class BlurPlace(IntEnum):
    """Place of the query blur: in the prologue of the attention kernel, or in a kernel before it."""

    PROLOGUE = 1
    BEFORE = 2


@dataclass(frozen=True)
class BlurEstimate:
    """The estimated time that a blur in either place adds to the attention.

    Attributes:
        prologue_microseconds: Time of the blur in the prologue.
        before_microseconds: Time of the separable kernel.
        narrow: Whether the grid is too narrow for the prologue.
    """

    prologue_microseconds: float
    before_microseconds: float
    narrow: bool

    @property
    def place(self) -> BlurPlace:
        """The cheaper place."""
        before = self.narrow or self.before_microseconds < self.prologue_microseconds
        return BlurPlace.BEFORE if before else BlurPlace.PROLOGUE


@lru_cache(maxsize=1024)
def estimate_blur(
    arch: str,
    grid: Grid,
    sigmas: tuple[float, ...],
    boundary: str,
    heads: int,
    head_dim: int,
    itemsize: int,
    block_m: int,
) -> BlurEstimate:
    """Estimate the cost of blurring samples with these sigmas.

    Args:
        arch: Architecture, such as ``"sm_90"``.
        grid: Grid of the tokens.
        sigmas: Sigmas of the blurred samples, all above 0.
        boundary: Boundary of the blur.
        heads: Number of heads of a sample.
        head_dim: Head dimension.
        itemsize: Bytes per element of the queries.
        block_m: Number of queries in a tile of the attention.

    Example:
        >>> for sigma in (1.0, 10.0):
        ...     print(estimate_blur("sm_90", Grid(64, 64), (sigma,), "reflect", 10, 64, 2, 128).place.name)
        BEFORE
        BEFORE
    """
    height, width = grid.height, grid.width
    tiles = -(-grid.tokens // block_m)
    rows_of_tile = min(height, max(1.0, block_m / width) + (block_m % width != 0))
    reads = instructions = before_bytes = before_instructions = 0.0
    for sigma in sigmas:
        row_reach, column_reach = (blur_reach(sigma, n, boundary) for n in (height, width))
        columns = width if block_m >= width else min(width, block_m + 2 * column_reach)
        source_rows, steps = min(height, 2 * row_reach + 1), tiles * rows_of_tile * heads
        reads += steps * source_rows * columns * head_dim * itemsize
        blocks = steps * -(-columns // 16) * head_dim / 64
        instructions += blocks * _PROLOGUE_WARPS * ((370 if itemsize == 2 else 900) + 26 * source_rows)
        moved, issued = _separable_blur(height, width, row_reach, column_reach, head_dim, itemsize)
        before_bytes += moved * heads
        before_instructions += issued * heads
    rate = _L2_BYTES_PER_MICROSECOND.get(arch, _DEFAULT_BYTES_PER_MICROSECOND)
    issue = _INSTRUCTIONS_PER_MICROSECOND.get(arch, _DEFAULT_INSTRUCTIONS_PER_MICROSECOND)
    launches = 1 if itemsize == 2 else 2
    before = launches * _LAUNCH_MICROSECONDS + before_bytes / rate + before_instructions / issue
    return BlurEstimate(reads / rate + instructions / issue, before, width < _MIN_WIDTH_IN_PROLOGUE)


def _separable_blur(
    height: int, width: int, row_reach: int, column_reach: int, head_dim: int, itemsize: int
) -> tuple[float, float]:
    """Return the bytes that the separable kernel moves for one head, and the instructions that its warps issue."""
    if itemsize == 4:
        taps = min(height, 2 * row_reach + 32) + min(width, 2 * column_reach + 32)
        elements = height * width * head_dim
        return elements * (2 * itemsize + 8), elements * taps * 0.047
    rows = 32 if height <= 32 else 64  # see image_constants and image_options
    source_rows = min(height, rows + 2 * row_reach)
    source_columns = min(width, 16 + 2 * column_reach) if width > 64 else width
    programs = -(-height // rows) * -(-width // 16) * -(-head_dim // 16)
    warps = 8 if max(height, width) <= 32 else 16
    steps = -(-source_rows // 16) * (0.6 + 0.4 * max(1.0, source_columns / 64))
    moved = programs * source_rows * source_columns * 16 * itemsize + height * width * head_dim * itemsize
    return moved, programs * warps * (500 + 165 * steps)


@lru_cache(maxsize=256)
def faster_sdpa(device: torch.device, head_dim: int, dtype: torch.dtype, tokens: int) -> str | None:
    """Return the PyTorch attention backend that was measured to be faster than the attention kernel; see ``Tuned``.

    Without a measurement, return None: the published rates of the two differ by less than the error of an estimate.
    """
    known = measured(architecture(device), head_dim, dtype)
    return None if known is None else known.sdpa.get(size_class(tokens))


@dataclass(frozen=True)
class Route:
    """The kernels that compute the samples of a batch.

    Attributes:
        uniform: Samples with infinite sigma whose image tokens get the result of one row from the few-row kernel.
        rest: Samples with tokens left to compute. Samples with infinite sigma come first, because their programs take
            longest.
        before: Samples of ``rest`` that the separable kernel blurs first.
        means: Samples of ``rest`` whose image tokens all get the mean query's result, from one tile per head.
        matrices: Matrices of ``rest``, for tiles of attention. None if ``rest`` is empty, or has so few unblurred rows
            that their keys are split over programs.
    """

    uniform: tuple[int, ...]
    rest: tuple[int, ...]
    before: tuple[int, ...] = ()
    means: tuple[int, ...] = ()
    matrices: BlurMatrices | None = None


@bounded_cache(most=64)
def attention_route(
    device: torch.device,
    dtype: torch.dtype,
    shape: torch.Size,
    keys: int,
    grid: Grid,
    sigmas: tuple[float, ...],
    boundary: str,
    unmasked: bool,
    described: bool,
    rows_alike: bool,
    place: BlurPlace | None = None,
) -> Route:
    """Choose the kernels of a call.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        shape: Shape of the queries.
        keys: Number of keys.
        grid: Grid of the query tokens.
        sigmas: One sigma per sample.
        boundary: Boundary of the blur.
        unmasked: Whether the kernel without a mask serves the call. Only that kernel can blur in its prologue.
        described: Whether keys and values can be copied by descriptors.
        rows_alike: Whether the mask, if any, is the same for all queries. Otherwise equal queries have unequal results.
        place: PROLOGUE or BEFORE to fix the place; None to choose it by cost.
    """
    _, heads, tokens, head_dim = shape
    axes = grid.height, grid.width
    if grid.tokens == 1:  # the mean of one token is the token
        sigmas = (0.0,) * len(sigmas)
    infinite = tuple(i for i, sigma in enumerate(sigmas) if math.isinf(sigma) and rows_alike)
    among_others = unmasked and len(infinite) < len(sigmas)  # other tiles take as long as a tile of equal rows
    means, uniform = (infinite, ()) if among_others else ((), infinite)
    others = tuple(i for i in range(len(sigmas)) if i not in infinite)
    rest = (infinite if means or grid.tokens < tokens else ()) + others
    arch, parallel = architecture(device), multiprocessors(device)
    tile = attention_tile(arch, head_dim, dtype, not unmasked, False, described)
    if not any(sigmas[i] for i in rest):
        programs = -(-tokens // tile.block_m) * heads * len(rest)
        if not rest or (programs < parallel and key_splits(programs, keys, tile.block_n, parallel)[0] > 1):
            return Route(uniform, rest)
    blurred = tuple(i for i in others if sigmas[i] > 0.0)
    wanted = tuple(sigmas[i] for i in blurred)
    if math.inf in wanted or not unmasked or not fits_prologue(arch, head_dim, dtype, described):
        place = BlurPlace.BEFORE  # supports infinite sigma, by a matrix of the mean
    elif wanted and place is None:
        place = estimate_blur(arch, grid, wanted, boundary, heads, head_dim, dtype.itemsize, tile.block_m).place
    before = blurred if place == BlurPlace.BEFORE else ()
    index = dict.fromkeys(rest, Unblurred.PLAIN.value) | dict.fromkeys(uniform, Unblurred.OUTSIDE.value)
    index |= {sample: Unblurred.MEAN.value - number for number, sample in enumerate(means)}
    numbers = {sigma: number for number, sigma in enumerate(sorted(set(wanted)))}
    index |= {sample: number if before else numbers[sigmas[sample]] for number, sample in enumerate(blurred)}
    in_prologue = tuple(sigmas[i] if i in blurred and not before else 0.0 for i in rest)
    matrices = blur_matrices(rest, in_prologue, *axes, boundary, device)
    matrices = replace(matrices, index=index_tensor(tuple(index[i] for i in rest), device))
    return Route(uniform, rest, before, means, matrices)
