# SPDX-License-Identifier: Apache-2.0
r"""Gaussian query blur and flash-style attention in one pass, for tiles of queries.

Mathematics, for the tokens of one sample and head with axis matrices ``B_h`` and ``B_w``::

    q~[i, j] = sum_{k, l} B_h[i, k] B_w[j, l] q[k, l]        (image tokens; others as they are)
    out      = softmax(scale * q~ k^T + mask) v
    lse      = logsumexp(scale * q~ k^T + mask)

Launch grid: one program per (sample, head, tile of BLOCK_M queries), tiles of a head next to each other so that they
share its keys and values in L2. A program blurs its queries in registers (they are rounded once to the input's
dtype and never written), then walks over the keys with an online softmax. Where ``_routes.py`` finds it cheaper, the
queries of blurred samples are blurred by the separable kernel first, and a program reads its tile of those instead.

Memory traffic per head: Q once for plain samples; for blurred ones every tile reads the source rows within reach, from
L2, or the blurred queries once; K and V once per tile, from L2; out once.

Head dimensions that are no power of two are split into two products, 80 = 64 + 16, so that nothing is padded further
than to 16.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._blur_matrices import OUTSIDE, BlurMatrices
from segkern.kernels._blur_tiles import query_tile
from segkern.kernels._configs import Tile, attention_tile, blur_precision, dot_precision, split_head_dim
from segkern.kernels._launch import can_be_described, compile_options, launching, scratch_memory, strides_are_wide
from segkern.kernels._masks import mask_arguments
from segkern.kernels._primitives import LN2, LOG2E, attend_keys, store_tile
from segkern.kernels._routes import BEFORE, HERE, Route
from segkern.kernels.gaussian_blur import blurred_image

_OUTSIDE = tl.constexpr(OUTSIDE)
_HERE = tl.constexpr(HERE)
_BEFORE = tl.constexpr(BEFORE)


@triton.jit
def _tiled_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # float32 [batch, heads, tokens], contiguous
    mask_ptr,
    samples_ptr,  # int32 [samples]
    tables_ptr,  # int32 [samples]
    row_weights_ptr,  # float32 [T, height, height]
    column_weights_ptr,  # float32 [T, width, width]
    reach_ptr,  # int32 [T, 2]
    blurred_ptr,  # [B, height * width, heads, HEAD_DIM], contiguous
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    heads,
    tokens,
    keys,
    height,
    width,
    grid_start,
    scale,  # of the logits, times log2(e); not negative
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLUR: tl.constexpr,  # 0, or _HERE: tables are matrices, or _BEFORE: tables are blurred samples
    MASK: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # keys and values are copied in blocks; without a mask
    WITH_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLUR_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    if WIDE:  # offsets inside a tile exceed 32 bits
        stride_qn, stride_qd = tl.cast(stride_qn, tl.int64), tl.cast(stride_qd, tl.int64)
        stride_kn, stride_kd = tl.cast(stride_kn, tl.int64), tl.cast(stride_kd, tl.int64)
        stride_vn, stride_vd = tl.cast(stride_vn, tl.int64), tl.cast(stride_vd, tl.int64)
        stride_on, stride_od = tl.cast(stride_on, tl.int64), tl.cast(stride_od, tl.int64)
        stride_mm, stride_mn = tl.cast(stride_mm, tl.int64), tl.cast(stride_mn, tl.int64)
    pid = tl.program_id(0)
    tiles = tl.cdiv(tokens, BLOCK_M)
    tile = pid % tiles
    head = tl.cast((pid // tiles) % heads, tl.int64)
    slot = pid // (tiles * heads)
    sample = tl.load(samples_ptr + slot).to(tl.int64)
    table = tl.load(tables_ptr + slot)

    start_m = tile * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    grid_index = start_m + offs_m - grid_start
    in_grid = (grid_index >= 0) & (grid_index < height * width)
    mask_m = start_m + offs_m < tokens
    if table == _OUTSIDE:
        mask_m = mask_m & (in_grid == 0)
        if (start_m >= grid_start) & (start_m + BLOCK_M <= grid_start + height * width):
            return

    q_ptr += sample * stride_qb + head * stride_qh
    k_ptr += sample * stride_kb + head * stride_kh
    v_ptr += sample * stride_vb + head * stride_vh
    if MASK != 0:
        mask_ptr += sample * stride_mb + head * stride_mh + tl.cast(start_m, tl.int64) * stride_mm

    q, q_rest = query_tile(
        q_ptr,
        blurred_ptr,
        row_weights_ptr,
        column_weights_ptr,
        reach_ptr,
        table,
        head,
        heads,
        start_m,
        mask_m,
        stride_qn,
        stride_qd,
        height,
        width,
        grid_start,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_C,
        BLOCK_D,
        BLOCK_R,
        BLUR == _HERE,
        BLUR == _BEFORE,
        BLUR_PRECISION,
    )

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    acc_rest = 0.0
    if BLOCK_R > 0:
        acc_rest = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc, acc_rest, row_max, row_sum = attend_keys(
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
        0,
        keys,
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
        EVEN_KEYS,
        DESCRIPTORS,
        PRECISION,
    )

    inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)[:, None]  # a row without keys gives 0
    out_tile = out_ptr + sample * stride_ob + head * stride_oh + tl.cast(start_m, tl.int64) * stride_on
    store_tile(out_tile, acc * inverse, offs_m, mask_m, stride_on, stride_od, 0, HEAD_DIM, BLOCK_D)
    if BLOCK_R > 0:
        store_tile(out_tile, acc_rest * inverse, offs_m, mask_m, stride_on, stride_od, BLOCK_D, HEAD_DIM, BLOCK_R)
    if WITH_LSE:
        lse_tile = lse_ptr + (sample * heads + head) * tokens + start_m
        tl.store(lse_tile + offs_m, (row_max + tl.math.log2(row_sum)) * LN2, mask=mask_m)


def launch_tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    grid: Grid,
    sigmas: tuple[float, ...],
    route: Route,
    tables: BlurMatrices,
    scale: float,
    attn_mask: torch.Tensor | None,
    boundary: str,
) -> None:
    """Write the samples of ``tables``, which are the route's, blurred where the route says."""
    _, heads, tokens, head_dim = query.shape
    keys = key.shape[2]
    tile = attention_tile(query.device, head_dim, query.dtype, attn_mask is not None)
    described = tile.descriptors and attn_mask is None and can_be_described(key, value)
    mask, mask_kind, mask_strides = mask_arguments(attn_mask, out)
    strides = query.stride(), key.stride(), value.stride(), out.stride()
    programs = -(-tokens // tile.block_m) * heads * tables.samples.numel()
    blur, blurred = HERE if tables.blurs else 0, None
    if route.before:
        blur, blurred = BEFORE, blurred_image(query, grid, sigmas, route.before, boundary)
    with launching(query.device), scratch_memory(described):
        _tiled_attention_kernel[(programs,)](
            query,
            key,
            value,
            out,
            out if lse is None else lse,
            mask,
            tables.samples,
            tables.tables,
            tables.rows,
            tables.columns,
            tables.reach,
            blurred,
            *strides[0],
            *strides[1],
            *strides[2],
            *strides[3],
            *mask_strides,
            heads,
            tokens,
            keys,
            grid.height,
            grid.width,
            grid.start,
            scale * LOG2E.value,
            BLUR=blur,
            MASK=mask_kind,
            EVEN_KEYS=keys % tile.block_n == 0,
            DESCRIPTORS=described,
            WITH_LSE=lse is not None,
            WIDE=strides_are_wide(*strides, mask_strides),
            **_constants(tile, head_dim, query.dtype),
        )


@lru_cache(maxsize=256)
def _constants(tile: Tile, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a tile settles for the compiler."""
    block_d, block_r = split_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_C": tile.block_c,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "PRECISION": dot_precision(dtype),
        "BLUR_PRECISION": blur_precision(dtype),
        **compile_options(tile),
    }
