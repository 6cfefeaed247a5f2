# SPDX-License-Identifier: Apache-2.0
"""Jit helpers shared by the kernels: tile loads, the online softmax, the loop over keys."""

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
def multiply_tiles(x, x_rest, y, y_rest, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """``x y^T`` of tiles whose channels lie in one part, or in two with BLOCK_R."""
    products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    if BLOCK_R > 0:
        products = tl.dot(x_rest, tl.trans(y_rest), products, input_precision=PRECISION)
    return products


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
def describe(ptr, tokens, stride_n, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A token matrix of one head for copies in blocks, which fill with zeros beyond its edges.

    Channels lie next to each other; the pointer and ``stride_n`` are multiples of 16 bytes.
    """
    return tl.make_tensor_descriptor(ptr, [tokens, HEAD_DIM], [stride_n, 1], [BLOCK_N, BLOCK_D])


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
    k_blocks,  # of :func:`describe`, with DESCRIPTORS
    k_rest_blocks,
    v_blocks,
    v_rest_blocks,
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
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to blocks of keys that begin in ``first .. stop - 1``; only with TAIL may one reach past the last key."""
    offs_n = tl.arange(0, BLOCK_N)
    for n in tl.range(first, stop, BLOCK_N):
        mask_n = n + offs_n < keys
        k_tile = k_ptr + tl.cast(n, tl.int64) * stride_kn
        v_tile = v_ptr + tl.cast(n, tl.int64) * stride_vn
        if DESCRIPTORS:
            k = k_blocks.load([n, 0])  # [BLOCK_N, BLOCK_D]
        else:
            k = load_tile(k_tile, offs_n, mask_n, stride_kn, stride_kd, 0, HEAD_DIM, BLOCK_D, TAIL)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if BLOCK_R > 0:
            if DESCRIPTORS:
                k_rest = k_rest_blocks.load([n, BLOCK_D])
            else:
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
        if DESCRIPTORS:
            v = v_blocks.load([n, 0])  # [BLOCK_N, BLOCK_D]
        else:
            v = load_tile(v_tile, offs_n, mask_n, stride_vn, stride_vd, 0, HEAD_DIM, BLOCK_D, TAIL)
        weights = weights.to(v.dtype)
        acc = tl.dot(weights, v, acc * factor[:, None], input_precision=PRECISION)
        if BLOCK_R > 0:
            if DESCRIPTORS:
                v_rest = v_rest_blocks.load([n, BLOCK_D])
            else:
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
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to keys ``first .. stop - 1``: the whole blocks, then what is left behind them at the very end.

    ``first`` is a multiple of BLOCK_N, and so is ``stop`` but for the last key.
    """
    k_blocks, k_rest_blocks, v_blocks, v_rest_blocks = 0.0, 0.0, 0.0, 0.0
    if DESCRIPTORS:
        k_blocks = describe(k_ptr, keys, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_D)
        v_blocks = describe(v_ptr, keys, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_D)
        if BLOCK_R > 0:
            k_rest_blocks = describe(k_ptr, keys, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_R)
            v_rest_blocks = describe(v_ptr, keys, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_R)
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
        k_blocks,
        k_rest_blocks,
        v_blocks,
        v_rest_blocks,
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
        DESCRIPTORS,
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
            k_blocks,
            k_rest_blocks,
            v_blocks,
            v_rest_blocks,
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
            DESCRIPTORS,
            PRECISION,
        )
    return acc, acc_rest, row_max, row_sum
