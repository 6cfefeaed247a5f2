# SPDX-License-Identifier: Apache-2.0
r"""Attention of few query rows, with keys split over programs: infinite sigma (one row per head) and coarse queries.

Mathematics, for one sample and head with rows ``q``. At infinite sigma there is one row, the mean of the image's
queries, and every image token gets its result::

    out[i] = softmax(scale * q[i] k^T + mask) v

Tiles of rows alone would keep few multiprocessors busy. A first kernel therefore gives each program a tile of rows and
a share of the keys, which it reduces to (weighted values, maximum, sum). A second kernel combines the shares of a row
and writes the result to the row's tokens.

Launch grids: tiles of rows (adjacent for the same keys) times splits times heads times samples for the first kernel;
for each sample and head, rows times tiles of tokens for the second.

Memory traffic: Q once per split, K and V once per tile of rows, shares of rows * splits * (D + 2) float32 written and
read, the output once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._blur_matrices import consecutive, index_tensor
from segkern.kernels._configs import MAX_SPLITS, Options, architecture, key_splits, multiprocessors, split_tile
from segkern.kernels._launch import (
    compile_options,
    launch,
    launching,
    next_power_of_2,
    strides_are_wide,
    tile_constants,
)
from segkern.kernels._masks import mask_arguments
from segkern.kernels._primitives import (
    LN2,
    LOG2E,
    Matrix,
    attend_keys,
    from_row,
    load_parts,
    load_tile,
    matrix,
    store_parts,
    store_tile,
)

_EXPANDED_TOKENS = 32  # tokens that a program of the second kernel writes if a row has many tokens
COMBINE_OPTIONS = Options(num_warps=4, num_stages=1)


@triton.jit
def _split_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    partial_ptr,  # float32 [samples * heads, splits, rows, HEAD_DIM + 2], contiguous
    samples_ptr,  # int32 [samples], samples of keys, values and mask
    query_samples_ptr,  # int32 [samples], samples of queries
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
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    heads,
    rows,
    keys,
    keys_per_split,
    splits,
    scale,  # factor of the logits, not negative
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides keys_per_split
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    tile = pid % tiles
    split = (pid // tiles) % splits
    head_of_sample = pid // (tiles * splits)
    head = tl.cast(head_of_sample % heads, tl.int64)
    sample = tl.load(samples_ptr + head_of_sample // heads).to(tl.int64)
    query_sample = tl.load(query_samples_ptr + head_of_sample // heads).to(tl.int64)

    start_m = tile * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = start_m + offs_m < rows
    q = matrix(q_ptr + query_sample * stride_qb + head * stride_qh, stride_qn, stride_qd, WIDE)
    k = matrix(k_ptr + sample * stride_kb + head * stride_kh, stride_kn, stride_kd, WIDE)
    v = matrix(v_ptr + sample * stride_vb + head * stride_vh, stride_vn, stride_vd, WIDE)
    mask = matrix(mask_ptr + sample * stride_mb + head * stride_mh, stride_mm, stride_mn, WIDE)
    q_tile, q_rest = load_parts(from_row(q, start_m), offs_m, mask_m, HEAD_DIM, BLOCK_D, BLOCK_R, True)
    first = split * keys_per_split
    acc, acc_rest, row_max, row_sum = attend_keys(
        q_tile,
        q_rest,
        k,
        v,
        from_row(mask, start_m),
        offs_m,
        mask_m,
        first,
        tl.minimum(first + keys_per_split, keys),
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

    row = tl.cast(head_of_sample * splits + split, tl.int64) * rows + start_m
    partial_ptr += row * (HEAD_DIM + 2)
    partial = Matrix(partial_ptr, HEAD_DIM + 2, 1)
    store_parts(partial, acc, acc_rest, offs_m, mask_m, HEAD_DIM, BLOCK_D, BLOCK_R)
    tl.store(partial_ptr + offs_m * (HEAD_DIM + 2) + HEAD_DIM, row_max, mask=mask_m)
    tl.store(partial_ptr + offs_m * (HEAD_DIM + 2) + HEAD_DIM + 1, row_sum, mask=mask_m)


@triton.jit(do_not_specialize=["with_lse"])
def _combine_splits_kernel(
    partial_ptr,  # float32 [samples * heads, splits, rows, HEAD_DIM + 2], contiguous
    out_ptr,
    lse_ptr,  # float32 [batch, heads, tokens], contiguous
    samples_ptr,  # int32 [samples]
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    heads,
    tokens,
    first_token,
    rows,
    copies,  # tokens of each row
    splits,
    with_lse,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,  # not less than splits
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)  # the other axes are limited to 65,535 programs
    tiles = tl.cdiv(copies, BLOCK_T)
    tile = pid % tiles
    row = (pid // tiles) % rows
    head_of_sample = pid // (tiles * rows)
    sample = tl.load(samples_ptr + head_of_sample // heads).to(tl.int64)
    head = tl.cast(head_of_sample % heads, tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_t = tl.arange(0, BLOCK_T)
    mask_s = offs_s < splits
    partial_ptr += (tl.cast(head_of_sample, tl.int64) * splits * rows + row) * (HEAD_DIM + 2)
    stride_s = tl.cast(rows, tl.int64) * (HEAD_DIM + 2)
    acc = load_tile(Matrix(partial_ptr, stride_s, 1), offs_s, mask_s, 0, HEAD_DIM, BLOCK_D, True)  # [BLOCK_S, BLOCK_D]
    maxima = tl.load(partial_ptr + offs_s * stride_s + HEAD_DIM, mask=mask_s, other=float("-inf"))
    sums = tl.load(partial_ptr + offs_s * stride_s + HEAD_DIM + 1, mask=mask_s, other=0.0)
    row_max = tl.max(maxima, axis=0)
    factor = tl.math.exp2((maxima - tl.where(row_max == float("-inf"), 0.0, row_max)) * LOG2E)  # [BLOCK_S]
    row_sum = tl.sum(sums * factor, axis=0)
    out_row = tl.sum(acc * factor[:, None], axis=0) * tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)  # [BLOCK_D]

    start = tile * BLOCK_T
    mask_t = start + offs_t < copies
    token = tl.cast(first_token + row * copies + start, tl.int64)
    out = matrix(out_ptr + sample * stride_ob + head * stride_oh, stride_on, stride_od, WIDE)
    written = tl.broadcast_to(out_row[None, :], [BLOCK_T, BLOCK_D])
    store_tile(from_row(out, token), written, offs_t, mask_t, 0, HEAD_DIM, BLOCK_D)
    if with_lse:
        lse = tl.zeros([BLOCK_T], dtype=tl.float32) + row_max + tl.math.log2(row_sum) * LN2
        tl.store(lse_ptr + (sample * heads + head) * tokens + token + offs_t, lse, mask=mask_t)


def launch_uniform_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    grid: Grid,
    samples: tuple[int, ...],
    scale: float,
    attn_mask: torch.Tensor | None,
) -> None:
    """Write the image tokens of ``samples`` at infinite sigma. ``attn_mask`` must not differ between queries."""
    rows, query_samples = mean_query(query, grid, samples)
    _launch(rows, query_samples, key, value, out, lse, samples, grid.start, grid.tokens, scale, attn_mask)


def mean_query(query: torch.Tensor, grid: Grid, samples: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return the mean query of the image for some samples, ``[any, heads, 1, head_dim]``, and each sample's index."""
    if grid.tokens == 1:  # the mean of one token is the token
        return query[:, :, grid.start : grid.stop], samples
    image = query if grid.tokens == query.shape[2] else query[:, :, grid.start : grid.stop]
    means = [_mean(image[run]) for run in consecutive(samples)]
    return means[0] if len(means) == 1 else torch.cat(means), tuple(range(len(samples)))


def _mean(image: torch.Tensor) -> torch.Tensor:
    """Return the mean over the tokens, summed in float32 and rounded once, as a GPU does by default."""
    if image.is_cuda or image.dtype == torch.float32:
        return image.mean(dim=2, keepdim=True)
    return image.mean(dim=2, keepdim=True, dtype=torch.float32).to(image.dtype)


def launch_split_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    samples: tuple[int, ...],
    scale: float,
    attn_mask: torch.Tensor | None,
) -> None:
    """Write all tokens of ``samples``, with unblurred queries."""
    _launch(query, samples, key, value, out, lse, samples, 0, 1, scale, attn_mask)


def _launch(
    query: torch.Tensor,  # [any, heads, rows, head_dim]
    query_samples: tuple[int, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    samples: tuple[int, ...],
    first_token: int,
    copies: int,
    scale: float,
    attn_mask: torch.Tensor | None,
) -> None:
    _, heads, rows, head_dim = query.shape
    keys = key.shape[2]
    tile = split_tile(architecture(query.device), head_dim, query.dtype, rows, attn_mask is not None)
    programs = -(-rows // tile.block_m) * heads * len(samples)
    splits, keys_per_split = key_splits(programs, keys, tile.block_n, multiprocessors(query.device))
    mask, mask_kind, mask_strides = mask_arguments(attn_mask, out)
    strides, out_strides = (query.stride(), key.stride(), value.stride()), out.stride()
    partial = query.new_empty(len(samples) * heads, splits, rows, head_dim + 2, dtype=torch.float32)
    sample_index = index_tensor(samples, query.device)
    with launching(query.device):
        launch(
            _split_attention_kernel,
            programs * splits,
            (query, key, value, mask),
            (partial, sample_index, index_tensor(query_samples, query.device)),
            (
                *strides[0],
                *strides[1],
                *strides[2],
                *mask_strides,
                heads,
                rows,
                keys,
                keys_per_split,
                splits,
                scale,
            ),
            {
                "MASK": mask_kind.value,
                "WIDE": strides_are_wide(*strides, mask_strides),
                **tile_constants(tile, head_dim, query.dtype),
            },
        )
        block_t = 1 if copies == 1 else _EXPANDED_TOKENS
        launch(
            _combine_splits_kernel,
            len(samples) * heads * rows * -(-copies // block_t),
            (partial, out),
            (partial if lse is None else lse, sample_index),
            (*out_strides, heads, out.shape[2], first_token, rows, copies, splits, int(lse is not None)),
            {
                "HEAD_DIM": head_dim,
                "BLOCK_S": MAX_SPLITS,
                "BLOCK_T": block_t,
                "BLOCK_D": next_power_of_2(head_dim),
                "WIDE": strides_are_wide(out_strides),
                **compile_options(COMBINE_OPTIONS),
            },
        )
