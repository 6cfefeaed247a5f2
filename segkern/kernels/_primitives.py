# SPDX-License-Identifier: Apache-2.0
"""Jit helpers shared by the kernels: tile loads and stores, the online softmax, attention over keys.

A head dimension that is not a power of two is split into two parts of BLOCK_D and BLOCK_R channels, as 80 = 64 + 16. If
BLOCK_R is 0, tensors of the second part are 0.0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from segkern.kernels._masks import MaskKind

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_NO_MASK = tl.constexpr(MaskKind.NONE.value)
_ADDITIVE = tl.constexpr(MaskKind.ADDITIVE.value)


class Matrix(NamedTuple):
    """A matrix in memory: pointer to the first element, and strides of rows and columns."""

    ptr: Any
    row_stride: Any
    column_stride: Any


@triton.jit
def matrix(ptr, row_stride, column_stride, WIDE: tl.constexpr):
    """Make a :class:`Matrix`. With WIDE, offsets inside a tile exceed 32 bits."""
    if WIDE:
        row_stride, column_stride = tl.cast(row_stride, tl.int64), tl.cast(column_stride, tl.int64)
    return Matrix(ptr, row_stride, column_stride)


@triton.jit
def from_row(x, n):
    """Return the rows ``n ..`` of a matrix."""
    return Matrix(x.ptr + tl.cast(n, tl.int64) * x.row_stride, x.row_stride, x.column_stride)


@triton.jit
def load_tile(
    x,
    offs_n,
    mask_n,
    first_d: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Load rows ``offs_n`` and columns ``first_d ..`` of a matrix; zero beyond HEAD_DIM and where masked."""
    offs_d = first_d + tl.arange(0, BLOCK_D)
    ptrs = x.ptr + offs_n[:, None] * x.row_stride + offs_d[None, :] * x.column_stride
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
def load_rows(rows, column_stride, mask_n, first_d: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load columns ``first_d ..`` of rows given by pointers, with a stride from column to column."""
    offs_d = first_d + tl.arange(0, BLOCK_D)
    ptrs = rows[:, None] + offs_d[None, :] * column_stride[:, None]
    return tl.load(ptrs, mask=mask_n[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_parts(
    x,
    offs_n,
    mask_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Load both parts of rows ``offs_n``: ``[BLOCK_N, BLOCK_D]`` and ``[BLOCK_N, BLOCK_R]``."""
    tile = load_tile(x, offs_n, mask_n, 0, HEAD_DIM, BLOCK_D, MASK_ROWS)
    rest = 0.0
    if BLOCK_R > 0:
        rest = load_tile(x, offs_n, mask_n, BLOCK_D, HEAD_DIM, BLOCK_R, MASK_ROWS)
    return tile, rest


@triton.jit
def store_tile(x, tile, offs_n, mask_n, first_d: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a tile in the pointer's dtype; the inverse of :func:`load_tile`."""
    offs_d = first_d + tl.arange(0, BLOCK_D)
    ptrs = x.ptr + offs_n[:, None] * x.row_stride + offs_d[None, :] * x.column_stride
    tl.store(ptrs, tile.to(x.ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def store_parts(
    x,
    tile,
    rest,
    offs_n,
    mask_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store both parts; the inverse of :func:`load_parts`."""
    store_tile(x, tile, offs_n, mask_n, 0, HEAD_DIM, BLOCK_D)
    if BLOCK_R > 0:
        store_tile(x, rest, offs_n, mask_n, BLOCK_D, HEAD_DIM, BLOCK_R)


@triton.jit
def multiply_tiles(x, x_rest, y, y_rest, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``x y^T`` of tiles in parts."""
    products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    if BLOCK_R > 0:
        products = tl.dot(x_rest, tl.trans(y_rest), products, input_precision=PRECISION)
    return products


@triton.jit
def online_softmax_update(logits, unit: tl.constexpr, row_max, row_sum):
    """Return unnormalised probabilities, the new maximum and sum, and the factor for previously accumulated values.

    ``unit`` converts logits to units of log2. It is applied to differences, because it would overflow the most negative
    finite number of an additive mask. A row with only minus infinity so far keeps maximum minus infinity and sum 0.
    """
    new_max = tl.maximum(row_max, tl.max(logits, axis=1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.math.exp2((logits - shift[:, None]) * unit)
    factor = tl.math.exp2((row_max - shift) * unit)
    return weights, new_max, row_sum * factor + tl.sum(weights, axis=1), factor


@triton.jit
def scaled_softmax_update(products, scale, row_max, row_sum):
    """:func:`online_softmax_update` of ``scale * products`` without masked logits, in units of log2; ``scale >= 0``.

    ``scale`` includes the conversion to log2 and is folded into one fused multiply-add per element.
    """
    new_max = tl.maximum(row_max, tl.max(products, axis=1) * scale)
    weights = tl.math.exp2(products * scale - new_max[:, None])
    factor = tl.math.exp2(row_max - new_max)
    return weights, new_max, row_sum * factor + tl.sum(weights, axis=1), factor


@triton.jit
def describe(x, rows, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Make a descriptor of one head's token matrix, for copies in blocks that are filled with zeros beyond the edges.

    Channels must be contiguous. The pointer and ``row_stride`` must be multiples of 16 bytes.
    """
    return tl.make_tensor_descriptor(x.ptr, [rows, HEAD_DIM], [x.row_stride, 1], [BLOCK_N, BLOCK_D])


@triton.jit
def attend_keys(
    q,
    q_rest,
    k,  # Matrix of the head's keys
    v,
    mask,  # Matrix of the tile's rows and all keys
    offs_m,
    mask_m,
    first,  # multiple of BLOCK_N
    stop,  # multiple of BLOCK_N, except at the last key
    keys,
    scale,  # factor of the logits, not negative
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return weighted values, maxima and sums of a tile of queries over keys ``first .. stop - 1``.

    Whole blocks of keys are processed first, without a mask of their rows, then the remaining keys. Without a mask,
    logits are in units of log2, which saves a multiplication.
    """
    unit: tl.constexpr = 1.0 if MASK == _NO_MASK else LOG2E
    if MASK == _NO_MASK:
        scale *= LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    acc_rest = 0.0
    if BLOCK_R > 0:
        acc_rest = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    full = tl.minimum(stop, keys - keys % BLOCK_N)
    for TAIL in tl.static_range(0, 2):
        for n in tl.range(full if TAIL else first, stop if TAIL else full, BLOCK_N):
            mask_n = n + offs_n < keys
            k_tile = load_tile(from_row(k, n), offs_n, mask_n, 0, HEAD_DIM, BLOCK_D, TAIL == 1)  # [BLOCK_N, BLOCK_D]
            products = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            if BLOCK_R > 0:  # loading both parts at the same time spills on some targets
                k_rest = load_tile(from_row(k, n), offs_n, mask_n, BLOCK_D, HEAD_DIM, BLOCK_R, TAIL == 1)
                products = tl.dot(q_rest, tl.trans(k_rest), products, input_precision=PRECISION)
            if MASK != _NO_MASK or TAIL:
                logits = products * scale
                if MASK != _NO_MASK:
                    mask_tile = mask.ptr + tl.cast(n, tl.int64) * mask.column_stride
                    mask_ptrs = mask_tile + offs_m[:, None] * mask.row_stride + offs_n[None, :] * mask.column_stride
                    bounds = mask_m[:, None] & mask_n[None, :]
                    if MASK == _ADDITIVE:
                        logits += tl.load(mask_ptrs, mask=bounds, other=0.0).to(tl.float32)
                    else:
                        logits = tl.where(tl.load(mask_ptrs, mask=bounds, other=1) != 0, logits, float("-inf"))
                if TAIL:
                    logits = tl.where(mask_n[None, :], logits, float("-inf"))
                weights, row_max, row_sum, factor = online_softmax_update(logits, unit, row_max, row_sum)
            else:
                weights, row_max, row_sum, factor = scaled_softmax_update(products, scale, row_max, row_sum)
            v_tile = load_tile(from_row(v, n), offs_n, mask_n, 0, HEAD_DIM, BLOCK_D, TAIL == 1)  # [BLOCK_N, BLOCK_D]
            weights = weights.to(v_tile.dtype)
            acc = tl.dot(weights, v_tile, acc * factor[:, None], input_precision=PRECISION)
            if BLOCK_R > 0:
                v_rest = load_tile(from_row(v, n), offs_n, mask_n, BLOCK_D, HEAD_DIM, BLOCK_R, TAIL == 1)
                acc_rest = tl.dot(weights, v_rest, acc_rest * factor[:, None], input_precision=PRECISION)
    return acc, acc_rest, row_max if MASK != _NO_MASK else row_max * LN2, row_sum
