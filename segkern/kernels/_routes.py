# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve an attention: where its queries are blurred, and whether its keys are split.

Queries are blurred in the prologue of attention, or by the separable kernel before it. In the prologue every tile of
queries reads, from L2, the source rows within reach of its own grid rows: cheap for a small blur, and half of the
attention's own work and more when every row is in reach. The separable kernel moves each query a few times whatever
the reach, but is two launches. The cost of either is bytes over the bandwidth of L2, plus launches. The rates are
rounded from published microbenchmarks of the devices; no timing of these kernels is in them yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from segkern.blur import blur_reach
from segkern.grid import Grid
from segkern.kernels._configs import architecture, attention_tile, key_splits, multiprocessors

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


def blurs_before(
    query: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], boundary: str, attn_mask: torch.Tensor | None
) -> bool:
    """Whether the separable kernel blurs the queries of samples of these sigmas before the attention."""
    _, heads, _, head_dim = query.shape
    arch = architecture(query.device)
    tile = attention_tile(query.device, head_dim, query.dtype, attn_mask is not None)
    return blur_route(arch, grid, sigmas, boundary, heads, head_dim, query.itemsize, tile.block_m).before


def few_rows(query: torch.Tensor, key: torch.Tensor, samples: int, attn_mask: torch.Tensor | None) -> bool:
    """Whether tiles of rows that are not blurred would leave multiprocessors idle while there are keys to split."""
    _, heads, tokens, head_dim = query.shape
    tile = attention_tile(query.device, head_dim, query.dtype, attn_mask is not None)
    programs = -(-tokens // tile.block_m) * heads * samples
    parallel = multiprocessors(query.device)
    return programs < parallel and key_splits(programs, key.shape[2], tile.block_n, parallel)[0] > 1
