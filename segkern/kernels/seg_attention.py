# SPDX-License-Identifier: Apache-2.0
r"""Gaussian query blur and flash-style attention in one pass.

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

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._configs import (
    attention_tile,
    blur_precision,
    dot_precision,
    split_head_dim,
)
from segkern.kernels._launch import compile_options, device_guard, strides_are_wide
from segkern.kernels._masks import mask_arguments
from segkern.kernels._primitives import (
    LN2,
    LOG2E,
    attend_keys,
    blur_tile,
    load_tile,
    store_tile,
)
from segkern.kernels._routes import BEFORE, HERE, attention_route
from segkern.kernels._tables import OUTSIDE, BlurTables
from segkern.kernels.gaussian_blur import blurred_image
from segkern.kernels.split_attention import launch_split_attention, launch_uniform_attention

_OUTSIDE = tl.constexpr(OUTSIDE)
_HERE = tl.constexpr(HERE)
_BEFORE = tl.constexpr(BEFORE)


@triton.jit
def _seg_attention_kernel(
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
    blurred_ptr,  # [blurred samples, height * width, heads, HEAD_DIM], contiguous
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

    q_tile = q_ptr + tl.cast(start_m, tl.int64) * stride_qn
    mask_plain = mask_m & tl.where(in_grid, table < 0, True)
    q = load_tile(q_tile, offs_m, mask_plain, stride_qn, stride_qd, 0, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    q_rest = 0.0
    if BLOCK_R > 0:
        q_rest = load_tile(q_tile, offs_m, mask_plain, stride_qn, stride_qd, BLOCK_D, HEAD_DIM, BLOCK_R, True)
    touches_image = (start_m + BLOCK_M > grid_start) & (start_m < grid_start + height * width)
    if BLUR == _BEFORE:
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
    if BLUR == _HERE:
        if (table >= 0) & touches_image:
            row_weights_ptr += table * height * height
            column_weights_ptr += table * width * width
            row_reach = tl.load(reach_ptr + 2 * table)
            column_reach = tl.load(reach_ptr + 2 * table + 1)
            x_ptr = q_ptr + tl.cast(grid_start, tl.int64) * stride_qn
            blurred = blur_tile(
                x_ptr,
                stride_qn,
                stride_qd,
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
                BLUR_PRECISION,
            )
            q = tl.where(in_grid[:, None], blurred.to(q.dtype), q)
            if BLOCK_R > 0:
                blurred_rest = blur_tile(
                    x_ptr,
                    stride_qn,
                    stride_qd,
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
                    BLUR_PRECISION,
                )
                q_rest = tl.where(in_grid[:, None], blurred_rest.to(q.dtype), q_rest)

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


def launch_seg_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    attn_mask: torch.Tensor | None,
    boundary: str,
) -> None:
    """Write attention of blurred queries to ``out`` and, where given, the rows' log-sum-exp to ``lse``.

    Samples of infinite sigma go to the kernel for few rows, and so do few rows that are not blurred; of the former
    only tokens outside the grid, if any, come here.
    """
    if query.numel() == 0:
        return
    if scale < 0.0:  # kernels take the maximum before scaling
        query, scale = -query, -scale
    masked, rows_alike = attn_mask is not None, attn_mask is None or attn_mask.shape[2] == 1
    kind = query.device, query.dtype, query.shape, key.shape[2]
    route = attention_route(*kind, grid, sigmas, boundary, masked, rows_alike)
    if route.uniform:
        launch_uniform_attention(query, key, value, out, lse, grid, route.uniform, scale, attn_mask)
    if route.few:
        launch_split_attention(query, key, value, out, lse, route.rest, scale, attn_mask)
    elif route.tables is not None:
        image = blurred_image(query, grid, sigmas, route.before, boundary) if route.before else None
        _launch_tiles(query, key, value, out, lse, grid, route.tables, image, scale, attn_mask)


def _launch_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    grid: Grid,
    tables: BlurTables,
    image: torch.Tensor | None,  # blurred before, or None
    scale: float,
    attn_mask: torch.Tensor | None,
) -> None:
    _, heads, tokens, head_dim = query.shape
    keys = key.shape[2]
    tile = attention_tile(query.device, head_dim, query.dtype, attn_mask is not None)
    block_d, block_r = split_head_dim(head_dim)
    mask, mask_kind, mask_strides = mask_arguments(attn_mask, out)
    programs = -(-tokens // tile.block_m) * heads * tables.samples.numel()
    with device_guard(query.device):
        _seg_attention_kernel[(programs,)](
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
            out if image is None else image,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *out.stride(),
            *mask_strides,
            heads,
            tokens,
            keys,
            grid.height,
            grid.width,
            grid.start,
            scale * LOG2E.value,
            HEAD_DIM=head_dim,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            BLOCK_D=block_d,
            BLOCK_R=block_r,
            BLUR=BEFORE if image is not None else HERE if tables.blurs else 0,
            MASK=mask_kind,
            EVEN_KEYS=keys % tile.block_n == 0,
            WITH_LSE=lse is not None,
            PRECISION=dot_precision(query.dtype),
            BLUR_PRECISION=blur_precision(query.dtype),
            WIDE=strides_are_wide(query, key, value, out, *(() if attn_mask is None else (attn_mask,))),
            **compile_options(tile),
        )
