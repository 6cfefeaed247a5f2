# SPDX-License-Identifier: Apache-2.0
r"""Attention with a mask, or of tensors whose strides no other kernel supports, for tiles of queries.

Mathematics, for the tokens of one sample and head. The image tokens ``q~`` are already blurred if sigma is not 0::

    out      = softmax(scale * q~ k^T + mask) v
    lse      = logsumexp(scale * q~ k^T + mask)

Launch grid: one program per (sample, head, tile of BLOCK_M queries), with tiles of a head adjacent to share its keys
and values in L2. A program loads its queries, each from the original or the blurred queries, and loops over the keys
with an online softmax.

Memory traffic per head: Q and out once; K and V once per tile, from L2; the mask once if it has one row per query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._blur_matrices import BlurMatrices, Unblurred
from segkern.kernels._configs import architecture, attention_tile
from segkern.kernels._launch import launch, launching, strides_are_wide, tile_constants
from segkern.kernels._masks import mask_arguments
from segkern.kernels._primitives import LN2, Matrix, attend_keys, from_row, load_rows, matrix, store_parts
from segkern.kernels._routes import Route
from segkern.kernels.gaussian_blur import blurred_image

_OUTSIDE = tl.constexpr(Unblurred.OUTSIDE.value)


@triton.jit(do_not_specialize=["with_lse"])
def _tiled_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # float32 [batch, heads, tokens], contiguous; not written unless with_lse
    mask_ptr,
    samples_ptr,  # int32 [samples]
    blur_index_ptr,  # int32 [samples]: index of a blurred image, or Unblurred
    blurred_ptr,  # [B, height * width, heads, HEAD_DIM], contiguous; not read if no sample is blurred
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
    scale,  # factor of the logits, not negative
    with_lse,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASK: tl.constexpr,  # a MaskKind
    PRECISION: tl.constexpr,
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
    grid_index = start_m - grid_start + offs_m
    in_image = (grid_index >= 0) & (grid_index < height * width)
    if blur == _OUTSIDE:
        mask_m = mask_m & (in_image == 0)
        if (start_m >= grid_start) & (start_m + BLOCK_M <= grid_start + height * width):
            return

    q = from_row(matrix(q_ptr + sample * stride_qb + head * stride_qh, stride_qn, stride_qd, WIDE), start_m)
    out = matrix(out_ptr + sample * stride_ob + head * stride_oh, stride_on, stride_od, WIDE)
    mask = matrix(mask_ptr + sample * stride_mb + head * stride_mh, stride_mm, stride_mn, WIDE)
    token = tl.cast(blur, tl.int64) * height * width + (start_m - grid_start)
    blurred = Matrix(blurred_ptr + (token * heads + head) * HEAD_DIM, heads * HEAD_DIM, 1)
    # Row pointers select either matrix, and rows are loaded once. A choice between two loaded tiles would be made in
    # registers, and matrix instructions with queries in registers wait for each other.
    is_blurred = in_image & (blur >= 0)
    rows = tl.where(is_blurred, blurred.ptr + offs_m * blurred.row_stride, q.ptr + offs_m * q.row_stride)
    column_stride = tl.where(is_blurred, blurred.column_stride, q.column_stride)
    q_tile = load_rows(rows, column_stride, mask_m, 0, HEAD_DIM, BLOCK_D)
    q_rest = 0.0
    if BLOCK_R > 0:
        q_rest = load_rows(rows, column_stride, mask_m, BLOCK_D, HEAD_DIM, BLOCK_R)
    k = matrix(k_ptr + sample * stride_kb + head * stride_kh, stride_kn, stride_kd, WIDE)
    v = matrix(v_ptr + sample * stride_vb + head * stride_vh, stride_vn, stride_vd, WIDE)
    acc, acc_rest, row_max, row_sum = attend_keys(
        q_tile,
        q_rest,
        k,
        v,
        from_row(mask, start_m),
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
        PRECISION,
    )

    inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)[:, None]  # the output of a row without keys is 0
    if BLOCK_R > 0:
        acc_rest *= inverse
    store_parts(from_row(out, start_m), acc * inverse, acc_rest, offs_m, mask_m, HEAD_DIM, BLOCK_D, BLOCK_R)
    if with_lse:
        lse_tile = lse_ptr + (sample * heads + head) * tokens + start_m
        tl.store(lse_tile + offs_m, row_max + tl.math.log2(row_sum) * LN2, mask=mask_m)


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
    """Write the samples of ``matrices``, the matrices of the route. None of them is blurred in a prologue."""
    _, heads, tokens, head_dim = query.shape
    keys = key.shape[2]
    tile = attention_tile(architecture(query.device), head_dim, query.dtype, masked=True)
    mask, mask_kind, mask_strides = mask_arguments(attn_mask, out)
    strides = query.stride(), key.stride(), value.stride(), out.stride()
    programs = -(-tokens // tile.block_m) * heads * matrices.samples.numel()
    blurred = blurred_image(query, grid, sigmas, route.before, boundary) if route.before else query
    with launching(query.device):
        launch(
            _tiled_attention_kernel,
            programs,
            (query, key, value, out, matrices.rows if lse is None else lse, mask),
            (matrices.samples, matrices.index, blurred),
            (
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
                scale,
                int(lse is not None),
            ),
            {
                "MASK": mask_kind.value,
                "WIDE": strides_are_wide(*strides, mask_strides),
                **tile_constants(tile, head_dim, query.dtype),
            },
        )
