# SPDX-License-Identifier: Apache-2.0
"""Jit helpers for the blur: of part of a line, of a tile of queries, and that tile as attention wants it."""

from __future__ import annotations

import triton
import triton.language as tl

from segkern.kernels._primitives import load_tile, store_tile


@triton.jit
def blur_block(
    x_ptr,  # first token of a line
    out_ptr,
    matrix_ptr,  # float32 [length, length]
    reach,
    start_i,
    length,
    stride_xi,
    stride_xd,
    stride_oi,
    stride_od,
    HEAD_DIM: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write tokens ``start_i ..`` of a line, blurred along it: a product with the band of the matrix within reach."""
    offs_i = start_i + tl.arange(0, BLOCK_I)
    mask_i = offs_i < length
    first_j = tl.maximum(start_i - reach, 0)
    last_j = tl.minimum(start_i + BLOCK_I + reach, length)
    for first_d in tl.static_range(0, HEAD_DIM, BLOCK_D):
        acc = tl.zeros([BLOCK_I, BLOCK_D], dtype=tl.float32)
        for j in range(first_j, last_j, BLOCK_J):
            offs_j = j + tl.arange(0, BLOCK_J)
            mask_j = offs_j < length
            weights = tl.load(  # [BLOCK_I, BLOCK_J]
                matrix_ptr + offs_i[:, None] * length + offs_j[None, :],
                mask=mask_i[:, None] & mask_j[None, :],
                other=0.0,
            )
            x = load_tile(x_ptr, offs_j, mask_j, stride_xi, stride_xd, first_d, HEAD_DIM, BLOCK_D, True)
            acc = tl.dot(weights, x.to(tl.float32), acc, input_precision=PRECISION)  # [BLOCK_I, BLOCK_D]
        store_tile(out_ptr, acc, offs_i, mask_i, stride_oi, stride_od, first_d, HEAD_DIM, BLOCK_D)


@triton.jit
def blur_tile(
    x_ptr,  # first token of the image of one (sample, head)
    stride_n,
    stride_d,
    row_weights_ptr,  # [height, height] float32
    column_weights_ptr,  # [width, width] float32
    row_reach,
    column_reach,
    start,  # grid index of the tile's first query; negative where other tokens come before the image
    height,
    width,
    first_d: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Blurred queries of a tile, float32 ``[BLOCK_M, BLOCK_D]``; zero outside the grid.

    For every grid row that the tile touches, source rows are first summed vertically with float32 multiply-adds, one
    block of columns at a time; one small product with the horizontal weights then spreads them over the
    tile's tokens of that row.
    """
    offs_c = tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    first = tl.maximum(start, 0)
    last = tl.minimum(start + BLOCK_M, height * width) - 1
    first_row = first // width
    last_row = last // width
    first_column = 0
    last_column = width
    if first_row == last_row:  # part of one row: only the columns in reach
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
                weight = tl.load(row_weights_ptr + r * height + h)
                source_ptr = x_ptr + tl.cast(h * width + c, tl.int64) * stride_n
                x = load_tile(source_ptr, offs_c, mask_c, stride_n, stride_d, first_d, HEAD_DIM, BLOCK_D, True)
                column_sum += weight * x.to(tl.float32)  # [BLOCK_C, BLOCK_D]
            # Tokens of grid row r lie next to each other: their columns count up, without a division per token.
            column = start - r * width + offs_m
            horizontal = tl.load(  # [BLOCK_M, BLOCK_C]
                column_weights_ptr + column[:, None] * width + (c + offs_c)[None, :],
                mask=((column >= 0) & (column < width))[:, None] & mask_c[None, :],
                other=0.0,
            )
            acc = tl.dot(horizontal, column_sum, acc, input_precision=PRECISION)
    return acc


@triton.jit
def query_tile(
    q_ptr,  # first token of one (sample, head)
    blurred_ptr,  # [B, height * width, heads, HEAD_DIM], contiguous
    row_weights_ptr,  # float32 [T, height, height]
    column_weights_ptr,  # float32 [T, width, width]
    reach_ptr,  # int32 [T, 2]
    table,  # of the sample: a matrix if HERE, else a blurred sample; negative where queries are as they are
    head,
    heads,
    start_m,
    mask_m,
    stride_n,
    stride_d,
    height,
    width,
    grid_start,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HERE: tl.constexpr,
    BLURRED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries of a tile, ``[BLOCK_M, BLOCK_D]`` and ``[BLOCK_M, BLOCK_R]``, those of the image blurred.

    HERE blurs them; with BLURRED they were blurred before, and are read. Only rows of ``mask_m`` are wanted.
    """
    offs_m = tl.arange(0, BLOCK_M)
    grid_index = start_m + offs_m - grid_start
    in_grid = (grid_index >= 0) & (grid_index < height * width)
    q_tile = q_ptr + tl.cast(start_m, tl.int64) * stride_n
    mask_plain = mask_m & tl.where(in_grid, table < 0, True)
    q = load_tile(q_tile, offs_m, mask_plain, stride_n, stride_d, 0, HEAD_DIM, BLOCK_D, True)
    q_rest = 0.0
    if BLOCK_R > 0:
        q_rest = load_tile(q_tile, offs_m, mask_plain, stride_n, stride_d, BLOCK_D, HEAD_DIM, BLOCK_R, True)
    touches_image = (start_m + BLOCK_M > grid_start) & (start_m < grid_start + height * width)
    if BLURRED:
        if (table >= 0) & touches_image:
            token = tl.cast(table, tl.int64) * height * width + (start_m - grid_start)
            blurred_tile = blurred_ptr + (token * heads + head) * HEAD_DIM
            mask_image = mask_m & in_grid
            stride = heads * HEAD_DIM
            blurred = load_tile(blurred_tile, offs_m, mask_image, stride, 1, 0, HEAD_DIM, BLOCK_D, True)
            q = tl.where(in_grid[:, None], blurred, q)
            if BLOCK_R > 0:
                rest = load_tile(blurred_tile, offs_m, mask_image, stride, 1, BLOCK_D, HEAD_DIM, BLOCK_R, True)
                q_rest = tl.where(in_grid[:, None], rest, q_rest)
    if HERE:
        if (table >= 0) & touches_image:
            row_weights_ptr += table * height * height
            column_weights_ptr += table * width * width
            row_reach = tl.load(reach_ptr + 2 * table)
            column_reach = tl.load(reach_ptr + 2 * table + 1)
            x_ptr = q_ptr + tl.cast(grid_start, tl.int64) * stride_n
            blurred = blur_tile(
                x_ptr,
                stride_n,
                stride_d,
                row_weights_ptr,
                column_weights_ptr,
                row_reach,
                column_reach,
                start_m - grid_start,
                height,
                width,
                0,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_C,
                BLOCK_D,
                PRECISION,
            )
            q = tl.where(in_grid[:, None], blurred.to(q.dtype), q)
            if BLOCK_R > 0:
                blurred_rest = blur_tile(
                    x_ptr,
                    stride_n,
                    stride_d,
                    row_weights_ptr,
                    column_weights_ptr,
                    row_reach,
                    column_reach,
                    start_m - grid_start,
                    height,
                    width,
                    BLOCK_D,
                    HEAD_DIM,
                    BLOCK_M,
                    BLOCK_C,
                    BLOCK_R,
                    PRECISION,
                )
                q_rest = tl.where(in_grid[:, None], blurred_rest.to(q.dtype), q_rest)
    return q, q_rest
