# SPDX-License-Identifier: Apache-2.0
"""Jit helpers shared by the kernels: tile loads, the blur of a query tile, the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    ptr,
    offs_n,
    mask_n,
    stride_n,
    stride_d,
    first_d: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Rows ``offs_n`` and columns ``first_d ..`` of a token matrix; zero beyond HEAD_DIM and where masked."""
    offs_d = first_d + tl.arange(0, BLOCK_D)
    ptrs = ptr + offs_n[:, None] * stride_n + offs_d[None, :] * stride_d
    if first_d + BLOCK_D <= HEAD_DIM:
        if MASK_ROWS:
            tile = tl.load(ptrs, mask=mask_n[:, None], other=0.0)
        else:
            tile = tl.load(ptrs)
    else:
        if MASK_ROWS:
            tile = tl.load(ptrs, mask=mask_n[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        else:
            tile = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def log2_bias(bias):
    """An additive mask in units of log2; the most negative finite number stays finite, as in PyTorch."""
    bias = bias.to(tl.float32)
    return tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2E, -3.0e38))


@triton.jit
def store_tile(
    ptr,
    tile,
    offs_n,
    mask_n,
    stride_n,
    stride_d,
    first_d: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The inverse of :func:`load_tile`, in the pointer's dtype."""
    offs_d = first_d + tl.arange(0, BLOCK_D)
    ptrs = ptr + offs_n[:, None] * stride_n + offs_d[None, :] * stride_d
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_d < HEAD_DIM)[None, :])


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
def online_softmax_update(logits, row_max, row_sum):
    """Probabilities (not normalised), new maximum and sum, and the factor for what was accumulated so far.

    ``logits`` are in units of log2. A row of minus infinities so far stays at maximum minus infinity and sum 0.
    """
    new_max = tl.maximum(row_max, tl.max(logits, axis=1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.math.exp2(logits - shift[:, None])
    factor = tl.math.exp2(row_max - shift)
    return weights, new_max, row_sum * factor + tl.sum(weights, axis=1), factor


@triton.jit
def scaled_softmax_update(products, scale, row_max, row_sum):
    """:func:`online_softmax_update` of ``scale * products`` where no logit is masked and ``scale >= 0``.

    The scale is folded into one fused multiply-add per element.
    """
    new_max = tl.maximum(row_max, tl.max(products, axis=1) * scale)
    weights = tl.math.exp2(products * scale - new_max[:, None])
    factor = tl.math.exp2(row_max - new_max)
    return weights, new_max, row_sum * factor + tl.sum(weights, axis=1), factor


@triton.jit
def attend_blocks(
    q,
    q_rest,
    acc,
    acc_rest,
    row_max,
    row_sum,
    k_ptr,
    v_ptr,
    mask_ptr,  # first query row of the tile
    offs_m,
    mask_m,
    first,
    stop,
    keys,
    stride_kn,
    stride_kd,
    stride_vn,
    stride_vd,
    stride_mm,
    stride_mn,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASK: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to blocks of keys that begin in ``first .. stop - 1``; only with TAIL may one reach past the last key."""
    offs_n = tl.arange(0, BLOCK_N)
    for n in tl.range(first, stop, BLOCK_N):
        mask_n = n + offs_n < keys
        k_tile = k_ptr + tl.cast(n, tl.int64) * stride_kn
        v_tile = v_ptr + tl.cast(n, tl.int64) * stride_vn
        k = load_tile(k_tile, offs_n, mask_n, stride_kn, stride_kd, 0, HEAD_DIM, BLOCK_D, TAIL)  # [BLOCK_N, BLOCK_D]
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if BLOCK_R > 0:
            k_rest = load_tile(k_tile, offs_n, mask_n, stride_kn, stride_kd, BLOCK_D, HEAD_DIM, BLOCK_R, TAIL)
            products = tl.dot(q_rest, tl.trans(k_rest), products, input_precision=PRECISION)
        if TAIL or MASK != 0:
            logits = products * scale
            if MASK != 0:
                mask_tile = mask_ptr + tl.cast(n, tl.int64) * stride_mn
                mask_ptrs = mask_tile + offs_m[:, None] * stride_mm + offs_n[None, :] * stride_mn
                bounds = mask_m[:, None] & mask_n[None, :]
                if MASK == 1:
                    logits += log2_bias(tl.load(mask_ptrs, mask=bounds, other=0.0))
                else:
                    logits = tl.where(tl.load(mask_ptrs, mask=bounds, other=1) != 0, logits, float("-inf"))
            if TAIL:
                logits = tl.where(mask_n[None, :], logits, float("-inf"))
            weights, row_max, row_sum, factor = online_softmax_update(logits, row_max, row_sum)
        else:
            weights, row_max, row_sum, factor = scaled_softmax_update(products, scale, row_max, row_sum)
        v = load_tile(v_tile, offs_n, mask_n, stride_vn, stride_vd, 0, HEAD_DIM, BLOCK_D, TAIL)  # [BLOCK_N, BLOCK_D]
        weights = weights.to(v.dtype)
        acc = tl.dot(weights, v, acc * factor[:, None], input_precision=PRECISION)
        if BLOCK_R > 0:
            v_rest = load_tile(v_tile, offs_n, mask_n, stride_vn, stride_vd, BLOCK_D, HEAD_DIM, BLOCK_R, TAIL)
            acc_rest = tl.dot(weights, v_rest, acc_rest * factor[:, None], input_precision=PRECISION)
    return acc, acc_rest, row_max, row_sum


@triton.jit
def attend_keys(
    q,
    q_rest,
    acc,
    acc_rest,
    row_max,
    row_sum,
    k_ptr,
    v_ptr,
    mask_ptr,  # first query row of the tile
    offs_m,
    mask_m,
    first,
    stop,
    keys,
    stride_kn,
    stride_kd,
    stride_vn,
    stride_vd,
    stride_mm,
    stride_mn,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASK: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to keys ``first .. stop - 1``: the whole blocks, then what is left behind them at the very end.

    ``first`` is a multiple of BLOCK_N, and so is ``stop`` but for the last key.
    """
    full = tl.minimum(stop, keys - keys % BLOCK_N)
    acc, acc_rest, row_max, row_sum = attend_blocks(
        q,
        q_rest,
        acc,
        acc_rest,
        row_max,
        row_sum,
        k_ptr,
        v_ptr,
        mask_ptr,
        offs_m,
        mask_m,
        first,
        full,
        keys,
        stride_kn,
        stride_kd,
        stride_vn,
        stride_vd,
        stride_mm,
        stride_mn,
        scale,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
        BLOCK_R,
        MASK,
        False,
        PRECISION,
    )
    if not EVEN_KEYS:
        acc, acc_rest, row_max, row_sum = attend_blocks(
            q,
            q_rest,
            acc,
            acc_rest,
            row_max,
            row_sum,
            k_ptr,
            v_ptr,
            mask_ptr,
            offs_m,
            mask_m,
            full,
            stop,
            keys,
            stride_kn,
            stride_kd,
            stride_vn,
            stride_vd,
            stride_mm,
            stride_mn,
            scale,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
            BLOCK_R,
            MASK,
            True,
            PRECISION,
        )
    return acc, acc_rest, row_max, row_sum
