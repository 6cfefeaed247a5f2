# SPDX-License-Identifier: Apache-2.0
"""Jit helper for attention's queries: load a tile of queries and blur it."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from segkern.kernels._primitives import from_row, load_tile


class ImageGrid(NamedTuple):
    """A grid of tokens. ``start`` is the row of its first token among the queries."""

    height: Any
    width: Any
    start: Any


class Weights(NamedTuple):
    """One blur: float32 ``[height, height]`` and ``[width, width]``, and the reach along each axis in tokens."""

    rows_ptr: Any
    columns_ptr: Any
    reach_ptr: Any


@triton.jit
def blur_tile(
    image,  # Matrix of one head's image
    weights,
    grid,
    start,  # grid index of the tile's first query; negative if other tokens precede the image
    first_d: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the blurred queries of a tile, float32 ``[BLOCK_M, BLOCK_D]``; zero outside the grid.

    For each grid row that the tile touches, source rows are first summed vertically with float32 multiply-adds, one
    block of columns at a time. A small product with the horizontal weights then distributes the sums over the tile's
    tokens of that row.
    """
    height, width = grid.height, grid.width
    row_reach, column_reach = tl.load(weights.reach_ptr), tl.load(weights.reach_ptr + 1)
    offs_c = tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    first = tl.maximum(start, 0)
    last = tl.minimum(start + BLOCK_M, height * width) - 1
    first_row = first // width
    last_row = last // width
    first_column = 0
    last_column = width
    if first_row == last_row:  # the tile is part of one row, so it needs only the columns within reach
        first_column = tl.maximum(first - first_row * width - column_reach, 0)
        last_column = tl.minimum(last - first_row * width + column_reach + 1, width)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for r in range(first_row, last_row + 1):
        first_source = tl.maximum(r - row_reach, 0)
        last_source = tl.minimum(r + row_reach + 1, height)
        for c in range(first_column, last_column, BLOCK_C):
            mask_c = c + offs_c < width
            column_sum = tl.zeros([BLOCK_C, BLOCK_D], dtype=tl.float32)
            for h in range(first_source, last_source):
                weight = tl.load(weights.rows_ptr + r * height + h)
                x = load_tile(from_row(image, h * width + c), offs_c, mask_c, first_d, HEAD_DIM, BLOCK_D, True)
                column_sum += weight * x.to(tl.float32)  # [BLOCK_C, BLOCK_D]
            # The tokens of grid row r are contiguous, so their columns count up without a division per token.
            column = start - r * width + offs_m
            horizontal = tl.load(  # [BLOCK_M, BLOCK_C]
                weights.columns_ptr + column[:, None] * width + (c + offs_c)[None, :],
                mask=((column >= 0) & (column < width))[:, None] & mask_c[None, :],
                other=0.0,
            )
            acc = tl.dot(horizontal, column_sum, acc, input_precision=PRECISION)
    return acc
