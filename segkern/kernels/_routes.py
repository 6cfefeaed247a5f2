# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve an attention: where its queries are blurred, and whether its keys are split.

Queries are blurred in the prologue of attention, or by the separable kernel before it. In the prologue every tile of
queries reads, from L2, the source rows within reach of its own grid rows: cheap for a small blur, and half of the
attention's own work and more when every row is in reach. The separable kernel moves each query a few times whatever
the reach, but is two launches. The cost of either is bytes over the bandwidth of L2, plus launches. The rates are
rounded from published microbenchmarks of the devices; no timing of these kernels is in them yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from segkern.core.bounded_cache import bounded_cache
from segkern.core.gaussian import blur_reach
from segkern.grid import Grid
from segkern.kernels._blur_matrices import OUTSIDE, PLAIN, BlurMatrices, blur_matrices, index_tensor
from segkern.kernels._configs import Tile, architecture, attention_tile, key_splits, measured, multiprocessors

HERE, BEFORE = 1, 2

_MIN_WIDTH_HERE = 8  # narrower grids waste most of a column block in the prologue
_LAUNCH_MICROSECONDS = 2.0  # of a kernel that waits for the one before it
_L2_BYTES_PER_MICROSECOND = {"sm_80": 4.0e6, "sm_90": 5.5e6, "sm_100": 9.0e6, "gfx942": 1.0e7}
_DEFAULT_BYTES_PER_MICROSECOND = 3.0e6


@dataclass(frozen=True)
class BlurRoute:
    """Which way is taken, and what both are estimated to add to the attention.

    Attributes:
        here_microseconds: of the blur in the prologue.
        before_microseconds: of the separable kernel.
        narrow: whether the grid is too narrow for the prologue.
    """

    here_microseconds: float
    before_microseconds: float
    narrow: bool

    @property
    def before(self) -> bool:
        """Whether the separable kernel blurs first."""
        return self.narrow or self.before_microseconds < self.here_microseconds


@lru_cache(maxsize=1024)
def blur_route(
    arch: str,
    grid: Grid,
    sigmas: tuple[float, ...],
    boundary: str,
    heads: int,
    head_dim: int,
    itemsize: int,
    block_m: int,
) -> BlurRoute:
    """The cheaper way to blur samples of these sigmas.

    Args:
        arch: such as ``"sm_90"``.
        grid: of the tokens.
        sigmas: of the blurred samples, each above 0.
        boundary: of the blur.
        heads: of a sample.
        head_dim: of a head.
        itemsize: bytes of an element of the queries.
        block_m: queries in a tile of the attention.

    Example:
        >>> routes = [blur_route("sm_90", Grid(64, 64), (sigma,), "reflect", 10, 64, 2, 128) for sigma in (1.0, 10.0)]
        >>> [route.before for route in routes]
        [False, True]
    """
    height, width = grid.height, grid.width
    tiles = -(-grid.tokens // block_m)
    rows_of_tile = min(height, max(1.0, block_m / width) + (block_m % width != 0))
    read = 0.0
    for sigma in sigmas:
        row_reach, column_reach = (blur_reach(sigma, n, boundary) for n in (height, width))
        columns = width if block_m >= width else min(width, block_m + 2 * column_reach)
        read += tiles * rows_of_tile * min(height, 2 * row_reach + 1) * columns * head_dim * heads * itemsize
    halfway = 4  # bytes of float32 between the two axes, written and read
    moved = len(sigmas) * grid.tokens * head_dim * heads * (2 * itemsize + 2 * halfway)
    rate = _L2_BYTES_PER_MICROSECOND.get(arch, _DEFAULT_BYTES_PER_MICROSECOND)
    before = 2 * _LAUNCH_MICROSECONDS + moved / rate
    return BlurRoute(read / rate, before, width < _MIN_WIDTH_HERE)


@lru_cache(maxsize=256)
def sdpa_is_faster(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether blurring first and PyTorch's attention were measured to be faster than the attention kernel."""
    known = measured(architecture(device), head_dim, dtype)
    return known is not None and known.sdpa


@dataclass(frozen=True)
class Route:
    """Which kernels compute which samples of a batch.

    Attributes:
        uniform: samples of infinite sigma, whose image tokens get one row's result.
        rest: samples of which any tokens are left to compute.
        few: whether the rest are few rows, which are not blurred: their keys are split over programs.
        before: those of the rest that the separable blur serves.
        tables: of the rest, for the tiles of attention; None with ``few`` or without a rest.
    """

    uniform: tuple[int, ...]
    rest: tuple[int, ...]
    few: bool
    before: tuple[int, ...]
    tables: BlurMatrices | None


@bounded_cache(most=1024)
def attention_route(
    device: torch.device,
    dtype: torch.dtype,
    shape: torch.Size,
    keys: int,
    grid: Grid,
    sigmas: tuple[float, ...],
    boundary: str,
    masked: bool,
    rows_alike: bool,
    blur: int | None = None,
) -> Route:
    """The kernels of a call.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        shape: of the queries.
        keys: how many there are.
        grid: of the query tokens.
        sigmas: one per sample.
        boundary: of the blur.
        masked: whether there is a mask.
        rows_alike: whether the mask, if any, is the same for all queries: else equal queries have unequal results.
        blur: HERE or BEFORE where that is settled; chosen by cost if not.
    """
    _, heads, tokens, head_dim = shape
    axes = grid.height, grid.width
    uniform = tuple(i for i, sigma in enumerate(sigmas) if math.isinf(sigma) and rows_alike)
    only_outside = set(uniform)
    only_image = grid.tokens == tokens
    rest = tuple(i for i in range(len(sigmas)) if not (only_image and i in only_outside))
    tile = attention_tile(device, head_dim, dtype, masked)
    if not rest:
        return Route(uniform, (), False, (), None)
    if not any(sigmas[i] for i in rest) and _few_rows(device, tile, tokens, keys, heads * len(rest)):
        return Route(uniform, rest, True, (), None)
    blurred = tuple(i for i in rest if sigmas[i] > 0.0 and i not in only_outside)
    wanted = tuple(sigmas[i] for i in blurred)
    if not blurred:
        blur = HERE
    elif math.inf in wanted:
        blur = BEFORE  # tables hold no matrix of the mean
    elif blur is None:
        sizes = heads, head_dim, dtype.itemsize, tile.block_m
        blur = choose_blur(architecture(device), grid, wanted, boundary, *sizes)
    if blur == HERE:
        tables = blur_matrices(rest, tuple(sigmas[i] for i in rest), *axes, boundary, device, outside=True)
        return Route(uniform, rest, False, (), tables)
    # Only the codes of samples are needed.
    tables = blur_matrices(rest, (0.0,) * len(rest), *axes, boundary, device, outside=True)
    places = {i: place for place, i in enumerate(blurred)}
    codes = tuple(places.get(i, OUTSIDE if i in only_outside else PLAIN) for i in rest)
    tables = replace(tables, tables=index_tensor(codes, device))
    return Route(uniform, rest, False, blurred, tables)


def choose_blur(
    arch: str,
    grid: Grid,
    sigmas: tuple[float, ...],
    boundary: str,
    heads: int,
    head_dim: int,
    itemsize: int,
    block_m: int,
) -> int:
    """HERE or BEFORE, whichever is estimated to cost less; arguments are those of :func:`blur_route`."""
    route = blur_route(arch, grid, sigmas, boundary, heads, head_dim, itemsize, block_m)
    return BEFORE if route.before else HERE


def _few_rows(device: torch.device, tile: Tile, tokens: int, keys: int, heads: int) -> bool:
    """Whether tiles of rows that are not blurred would leave multiprocessors idle while there are keys to split."""
    programs = -(-tokens // tile.block_m) * heads
    parallel = multiprocessors(device)
    return programs < parallel and key_splits(programs, keys, tile.block_n, parallel)[0] > 1
