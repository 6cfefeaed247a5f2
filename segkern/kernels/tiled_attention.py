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
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._blur_matrices import BlurMatrices, Unblurred
from segkern.kernels._configs import architecture, attention_tile, blur_precision
from segkern.kernels._launch import can_be_described, launching, scratch_memory, strides_are_wide, tile_constants
from segkern.kernels._masks import mask_arguments
from segkern.kernels._primitives import LN2, LOG2E, Matrix, attend_keys, from_row, matrix, store_parts
from segkern.kernels._query_tiles import ImageGrid, Weights, query_tile
from segkern.kernels._routes import BlurPlace, Route
from segkern.kernels.gaussian_blur import blurred_image

_OUTSIDE = tl.constexpr(Unblurred.OUTSIDE.value)
_BEFORE = tl.constexpr(BlurPlace.BEFORE.value)


@triton.jit
def _tiled_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # float32 [batch, heads, tokens], contiguous
    mask_ptr,
    samples_ptr,  # int32 [samples]
    blur_index_ptr,  # int32 [samples]: of a matrix if blurred in the prologue, of a blurred image if before
    row_weights_ptr,  # float32 [T, height, height]
    column_weights_ptr,  # float32 [T, width, width]
    reach_ptr,  # int32 [T, 2]
    blurred_ptr,  # [B, height * width, heads, HEAD_DIM], contiguous; None unless blurred before
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
    BLUR: tl.constexpr,  # a BlurPlace
    MASK: tl.constexpr,  # a MaskKind
    EVEN_KEYS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # keys and values are copied in blocks; without a mask
    WITH_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLUR_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(tokens, BLOCK_M)
    tile = pid % tiles
    head = tl.cast((pid // tiles) % heads, tl.int64)
    slot = pid // (tiles * heads)
    sample = tl.load(samples_ptr + slot).to(tl.int64)
    blur = tl.load(blur_index_ptr + slot)

    start_m = tile * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = start_m + offs_m < tokens
    if blur == _OUTSIDE:
        grid_index = start_m + offs_m - grid_start
        mask_m = mask_m & ((grid_index < 0) | (grid_index >= height * width))
        if (start_m >= grid_start) & (start_m + BLOCK_M <= grid_start + height * width):
            return

    q = matrix(q_ptr + sample * stride_qb + head * stride_qh, stride_qn, stride_qd, WIDE)
    out = matrix(out_ptr + sample * stride_ob + head * stride_oh, stride_on, stride_od, WIDE)
    mask = matrix(mask_ptr + sample * stride_mb + head * stride_mh, stride_mm, stride_mn, WIDE)
    mask = from_row(mask, start_m)
    blurred = q
    if BLUR == _BEFORE:
        image = tl.cast(blur, tl.int64) * height * width * heads + head
        blurred = Matrix(blurred_ptr + image * HEAD_DIM, heads * HEAD_DIM, 1)
    grid = ImageGrid(height, width, grid_start)
    weights = Weights(
        row_weights_ptr + blur * height * height, column_weights_ptr + blur * width * width, reach_ptr + 2 * blur
    )
    q_tile, q_rest = query_tile(
        q,
        blurred,
        weights,
        grid,
        blur >= 0,
        start_m,
        mask_m,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_C,
        BLOCK_D,
        BLOCK_R,
        BLUR,
        BLUR_PRECISION,
    )
    k = matrix(k_ptr + sample * stride_kb + head * stride_kh, stride_kn, stride_kd, WIDE)
    v = matrix(v_ptr + sample * stride_vb + head * stride_vh, stride_vn, stride_vd, WIDE)
    acc, acc_rest, row_max, row_sum = attend_keys(
        q_tile,
        q_rest,
        k,
        v,
        mask,
        offs_m,
        mask_m,
        0,
        keys,
        keys,
        scale,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_R,
        MASK,
        EVEN_KEYS,
        DESCRIPTORS,
        PRECISION,
    )

    inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)[:, None]  # a row without keys gives 0
    if BLOCK_R > 0:
        acc_rest *= inverse
    store_parts(from_row(out, start_m), acc * inverse, acc_rest, offs_m, mask_m, HEAD_DIM, BLOCK_D, BLOCK_R)
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
    matrices: BlurMatrices,
    scale: float,
    attn_mask: torch.Tensor | None,
    boundary: str,
) -> None:
    """Write the samples of ``matrices``, which are the route's, blurred where the route says."""
    _, heads, tokens, head_dim = query.shape
    keys = key.shape[2]
    tile = attention_tile(architecture(query.device), head_dim, query.dtype, attn_mask is not None)
    described = tile.descriptors and attn_mask is None and can_be_described(key, value)
    mask, mask_kind, mask_strides = mask_arguments(attn_mask, out)
    strides = query.stride(), key.stride(), value.stride(), out.stride()
    programs = -(-tokens // tile.block_m) * heads * matrices.samples.numel()
    place, blurred = BlurPlace.PROLOGUE if matrices.reach.numel() else BlurPlace.NOWHERE, None
    if route.before:
        place, blurred = BlurPlace.BEFORE, blurred_image(query, grid, sigmas, route.before, boundary)
    with launching(query.device), scratch_memory(described):
        _tiled_attention_kernel[(programs,)](
            query,
            key,
            value,
            out,
            out if lse is None else lse,
            mask,
            matrices.samples,
            matrices.index,
            matrices.rows,
            matrices.columns,
            matrices.reach,
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
            BLOCK_C=tile.block_c,
            BLUR=place.value,
            MASK=mask_kind.value,
            EVEN_KEYS=keys % tile.block_n == 0,
            DESCRIPTORS=described,
            WITH_LSE=lse is not None,
            BLUR_PRECISION=blur_precision(query.dtype),
            WIDE=strides_are_wide(*strides, mask_strides),
            **tile_constants(tile, head_dim, query.dtype),
        )
