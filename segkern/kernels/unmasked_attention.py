# SPDX-License-Identifier: Apache-2.0
r"""Attention without a mask, the kernel that most models use. Queries may be blurred before it or in its prologue.

Mathematics, for the tokens of one sample and head with axis matrices ``B_h`` and ``B_w``::

    q~[i, j] = sum_{k, l} B_h[i, k] B_w[j, l] q[k, l]        (image tokens; other tokens unchanged)
    q~[i, j] = the mean of the image's queries              (image tokens at infinite sigma)
    out      = softmax(scale * q~ k^T) v
    lse      = logsumexp(scale * q~ k^T)

Launch grid: one program per (sample, head, tile of BLOCK_M queries), with tiles of a head adjacent to share its keys
and values in L2. No tile straddles an end of the image, so a tile loads all its queries from one place, the original or
the blurred queries. The place is chosen before the load. A choice between two loaded tiles would keep the queries in
registers, and matrix instructions that read queries from registers wait for each other.

At infinite sigma, all image tokens of a head have the same result. The first tile of the head computes it with equal
rows, the mean query read with a stride of 0, and writes it to all image tokens. The other tiles return immediately. A
tile of equal rows takes as long as any other, so its time is hidden by the tiles of the batch's other samples.

A program loops over the keys from the last block, the only one that may be ragged, to the first, with an online
softmax. The product of a block with the values is issued after the next block's product with the keys, so it overlaps
the exponentials of that block; on Hopper, the kernel would otherwise wait for the product immediately. For wide heads,
the shares are rounded before the delayed product, which halves their registers.

Memory traffic per head: Q and out once, except that a tile that blurs reads the source rows within reach, from L2; K
and V once per tile, from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._blur_matrices import BlurMatrices, Unblurred
from segkern.kernels._configs import architecture, attention_tile, blur_precision
from segkern.kernels._launch import launch, launching, scratch_memory, tile_constants
from segkern.kernels._primitives import (
    LN2,
    LOG2E,
    Matrix,
    describe,
    from_row,
    load_parts,
    load_tile,
    multiply_tiles,
    scaled_softmax_update,
    store_parts,
)
from segkern.kernels._query_tiles import ImageGrid, Weights, blur_tile
from segkern.kernels._routes import Route
from segkern.kernels.gaussian_blur import blurred_image
from segkern.kernels.split_attention import mean_query

_OUTSIDE = tl.constexpr(Unblurred.OUTSIDE.value)
_MEAN = tl.constexpr(Unblurred.MEAN.value)


@triton.jit(do_not_specialize=["with_lse"])
def _unmasked_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # float32 [batch, heads, tokens], contiguous; not written unless with_lse
    samples_ptr,  # int32 [samples]
    blur_index_ptr,  # int32 [samples]: index of a blurred image, of a matrix if PROLOGUE, or Unblurred
    blurred_ptr,  # [B, height * width, heads, HEAD_DIM], contiguous; not read if no sample was blurred before
    means_ptr,  # [M, heads, HEAD_DIM], contiguous; not read if no sample has MEAN
    row_weights_ptr,  # float32 [T, height, height], if PROLOGUE
    column_weights_ptr,  # float32 [T, width, width]
    reach_ptr,  # int32 [T, 2]
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    heads,
    tokens,
    keys,  # at least 1
    height,
    width,
    grid_start,
    scale,  # factor of the logits, times log2(e); not negative
    with_lse,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PROLOGUE: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # whether keys and values are copied in blocks
    PRECISION: tl.constexpr,
    BLUR_PRECISION: tl.constexpr,
):
    # The accumulators use 64 registers per product, which leaves no room for 64 registers of float32 shares.
    ROUND_EARLY: tl.constexpr = DESCRIPTORS and BLOCK_D >= 128 and BLOCK_N >= 128
    grid_stop = grid_start + height * width
    first_tiles = tl.cdiv(grid_start, BLOCK_M)
    image_tiles = tl.cdiv(height * width, BLOCK_M)
    tiles = first_tiles + image_tiles + tl.cdiv(tokens - grid_stop, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % tiles
    head = tl.cast((pid // tiles) % heads, tl.int64)
    slot = pid // (tiles * heads)
    sample = tl.load(samples_ptr + slot).to(tl.int64)
    blur = tl.load(blur_index_ptr + slot)

    in_image = (tile >= first_tiles) & (tile < first_tiles + image_tiles)
    is_mean = in_image & (blur <= _MEAN)
    if in_image & ((blur == _OUTSIDE) | (is_mean & (tile > first_tiles))):
        return
    start_m = tile * BLOCK_M
    stop_m = grid_start
    if in_image:
        start_m = grid_start + (tile - first_tiles) * BLOCK_M
        stop_m = grid_stop
    elif tile >= first_tiles:
        start_m = grid_stop + (tile - first_tiles - image_tiles) * BLOCK_M
        stop_m = tokens
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = start_m + offs_m < stop_m

    q = Matrix(q_ptr + sample * stride_qb + head * stride_qh, stride_qn, 1)
    rows = from_row(q, start_m)
    is_blurred = in_image & (blur >= 0)
    if not PROLOGUE:
        token = tl.cast(blur, tl.int64) * height * width + (start_m - grid_start)
        first = tl.where(is_blurred, blurred_ptr + (token * heads + head) * HEAD_DIM, rows.ptr)
        rows = Matrix(first, tl.where(is_blurred, heads * HEAD_DIM, stride_qn), 1)
    mean = means_ptr + ((_MEAN - tl.cast(blur, tl.int64)) * heads + head) * HEAD_DIM
    rows = Matrix(tl.where(is_mean, mean, rows.ptr), tl.where(is_mean, 0, rows.row_stride), 1)
    q_tile, q_rest = load_parts(rows, offs_m, mask_m, HEAD_DIM, BLOCK_D, BLOCK_R, True)
    if PROLOGUE:
        if is_blurred:
            image, grid, start = from_row(q, grid_start), ImageGrid(height, width, grid_start), start_m - grid_start
            weights = Weights(
                row_weights_ptr + blur * height * height,
                column_weights_ptr + blur * width * width,
                reach_ptr + 2 * blur,
            )
            tile_blur = blur_tile(image, weights, grid, start, 0, HEAD_DIM, BLOCK_M, BLOCK_C, BLOCK_D, BLUR_PRECISION)
            q_tile = tile_blur.to(q_tile.dtype)
            if BLOCK_R > 0:
                rest_blur = blur_tile(
                    image, weights, grid, start, BLOCK_D, HEAD_DIM, BLOCK_M, BLOCK_C, BLOCK_R, BLUR_PRECISION
                )
                q_rest = rest_blur.to(q_tile.dtype)
    k = Matrix(k_ptr + sample * stride_kb + head * stride_kh, stride_kn, 1)
    v = Matrix(v_ptr + sample * stride_vb + head * stride_vh, stride_vn, 1)
    out = Matrix(out_ptr + sample * stride_ob + head * stride_oh, stride_on, 1)
    if DESCRIPTORS:
        k_blocks = describe(k, keys, HEAD_DIM, BLOCK_N, BLOCK_D)
        v_blocks = describe(v, keys, HEAD_DIM, BLOCK_N, BLOCK_D)
        if BLOCK_R > 0:
            k_rest_blocks = describe(k, keys, HEAD_DIM, BLOCK_N, BLOCK_R)
            v_rest_blocks = describe(v, keys, HEAD_DIM, BLOCK_N, BLOCK_R)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    acc_rest = 0.0
    if BLOCK_R > 0:
        acc_rest = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    factor = tl.full([BLOCK_M], 1.0, dtype=tl.float32)

    last = (tl.cdiv(keys, BLOCK_N) - 1) * BLOCK_N
    mask_n = last + offs_n < keys
    if DESCRIPTORS:
        k_tile = k_blocks.load([last, 0])
        k_rest = 0.0
        if BLOCK_R > 0:
            k_rest = k_rest_blocks.load([last, BLOCK_D])
    else:
        k_tile, k_rest = load_parts(from_row(k, last), offs_n, mask_n, HEAD_DIM, BLOCK_D, BLOCK_R, not EVEN_KEYS)
    logits = multiply_tiles(q_tile, q_rest, k_tile, k_rest, BLOCK_R, PRECISION) * scale
    if not EVEN_KEYS:
        logits = tl.where(mask_n[None, :], logits, float("-inf"))
    row_max = tl.max(logits, axis=1)
    shares = tl.math.exp2(logits - row_max[:, None])  # not normalised; of the block before the loop's
    row_sum = tl.sum(shares, axis=1)
    if ROUND_EARLY:
        shares = shares.to(q_tile.dtype).to(tl.int16, bitcast=True)

    for done in tl.range(BLOCK_N, last + BLOCK_N, BLOCK_N):
        n = last - done
        if DESCRIPTORS:
            products = tl.dot(q_tile, tl.trans(k_blocks.load([n, 0])), input_precision=PRECISION)
            if BLOCK_R > 0:
                k_rest = k_rest_blocks.load([n, BLOCK_D])
                products = tl.dot(q_rest, tl.trans(k_rest), products, input_precision=PRECISION)
            v_tile = v_blocks.load([n + BLOCK_N, 0])
        else:
            k_tile = load_tile(from_row(k, n), offs_n, mask_n, 0, HEAD_DIM, BLOCK_D, False)
            products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if BLOCK_R > 0:
                k_rest = load_tile(from_row(k, n), offs_n, mask_n, BLOCK_D, HEAD_DIM, BLOCK_R, False)
                products = tl.dot(q_rest, tl.trans(k_rest), products, input_precision=PRECISION)
            mask_v = n + BLOCK_N + offs_n < keys
            v_tile = load_tile(from_row(v, n + BLOCK_N), offs_n, mask_v, 0, HEAD_DIM, BLOCK_D, not EVEN_KEYS)
        if ROUND_EARLY:
            # The product reads registers until it is waited for, and the next shares must not overwrite them, so they
            # are copied. ptxas before CUDA 13.3 drops a plain copy (triton issue 9433), but not a computed one: an
            # exclusive or with a zero that is unknown at compile time.
            rounded = (shares ^ (with_lse >> 1).to(tl.int16)).to(v_tile.dtype, bitcast=True)
        else:
            rounded = shares.to(v_tile.dtype)
        acc = tl.dot(rounded, v_tile, acc * factor[:, None], input_precision=PRECISION)
        if BLOCK_R > 0:
            if DESCRIPTORS:
                v_rest = v_rest_blocks.load([n + BLOCK_N, BLOCK_D])
            else:
                v_rest = load_tile(from_row(v, n + BLOCK_N), offs_n, mask_v, BLOCK_D, HEAD_DIM, BLOCK_R, not EVEN_KEYS)
            acc_rest = tl.dot(rounded, v_rest, acc_rest * factor[:, None], input_precision=PRECISION)
        shares, row_max, row_sum, factor = scaled_softmax_update(products, scale, row_max, row_sum)
        if ROUND_EARLY:
            shares = shares.to(v_tile.dtype).to(tl.int16, bitcast=True)

    if DESCRIPTORS:
        v_tile = v_blocks.load([0, 0])
        v_rest = 0.0
        if BLOCK_R > 0:
            v_rest = v_rest_blocks.load([0, BLOCK_D])
    else:
        v_tile, v_rest = load_parts(v, offs_n, offs_n < keys, HEAD_DIM, BLOCK_D, BLOCK_R, not EVEN_KEYS)
    rounded = shares.to(v_tile.dtype, bitcast=True) if ROUND_EARLY else shares.to(v_tile.dtype)
    acc = tl.dot(rounded, v_tile, acc * factor[:, None], input_precision=PRECISION)
    inverse = (1.0 / row_sum)[:, None]
    if BLOCK_R > 0:
        acc_rest = tl.dot(rounded, v_rest, acc_rest * factor[:, None], input_precision=PRECISION) * inverse
    lse_head = lse_ptr + (sample * heads + head) * tokens
    stop_stores = tl.where(is_mean, stop_m, start_m + 1)
    for m in range(start_m, stop_stores, BLOCK_M):
        mask_m = m + offs_m < stop_m
        store_parts(from_row(out, m), acc * inverse, acc_rest, offs_m, mask_m, HEAD_DIM, BLOCK_D, BLOCK_R)
        if with_lse:
            tl.store(lse_head + m + offs_m, (row_max + tl.math.log2(row_sum)) * LN2, mask=mask_m)


def launch_unmasked_attention(
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
    boundary: str,
    described: bool,
) -> None:
    """Write the samples of ``matrices``, the matrices of the route, to ``out``.

    Channels must be contiguous, offsets inside a tile must fit 32 bits, and there must be keys. ``described`` is True
    if the device can copy keys and values by descriptors.
    """
    _, heads, tokens, head_dim = query.shape
    keys = key.shape[2]
    prologue = not route.before and matrices.reach.numel() > 0
    arch = architecture(query.device)
    tile = attention_tile(arch, head_dim, query.dtype, False, prologue, described)
    by_descriptors = tile.descriptors and described
    tiles = sum(-(-count // tile.block_m) for count in (grid.start, grid.tokens, tokens - grid.stop))
    blurred = blurred_image(query, grid, sigmas, route.before, boundary) if route.before else query
    means = mean_query(query, grid, route.means)[0].contiguous() if route.means else query
    with launching(query.device), scratch_memory(by_descriptors):
        launch(
            _unmasked_attention_kernel,
            tiles * heads * matrices.samples.numel(),
            (query, key, value, out),
            (
                matrices.rows if lse is None else lse,
                matrices.samples,
                matrices.index,
                blurred,
                means,
                matrices.rows,
                matrices.columns,
                matrices.reach,
            ),
            (
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                *out.stride()[:3],
                heads,
                tokens,
                keys,
                grid.height,
                grid.width,
                grid.start,
                scale * LOG2E.value,
                int(lse is not None),
            ),
            {
                "BLOCK_C": tile.block_c,
                "PROLOGUE": prologue,
                "EVEN_KEYS": keys % tile.block_n == 0,
                "DESCRIPTORS": by_descriptors,
                "BLUR_PRECISION": blur_precision(query.dtype),
                **tile_constants(tile, head_dim, query.dtype),
            },
        )
