# SPDX-License-Identifier: Apache-2.0
r"""Attention at infinite sigma: every image token has the mean query, so a head has one row.

Mathematics, for one sample and head with ``q = mean of the image's queries``::

    out[i] = softmax(scale * q k^T + mask) v        for every image token i, the same row

No N x N work: a first kernel splits the keys over programs, each of which reduces its share to (maximum, sum,
weighted values); a second one combines the shares and writes the row to the image's tokens.

Launch grids: (samples * heads, splits), then (samples * heads, tiles of tokens).

Memory traffic per head: Q once (its mean, by PyTorch), K and V once, partial results of splits * (D + 2) float32,
the output once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._configs import Options
from segkern.kernels._launch import compile_options, device_guard, strides_are_wide
from segkern.kernels._masks import mask_arguments
from segkern.kernels._primitives import LN2, LOG2E, load_tile, log2_bias, store_tile
from segkern.kernels._tables import index_tensor

_BLOCK_N = 32  # keys at a time
_BLOCK_TOKENS = 32  # output tokens a program of the second kernel writes
_KEYS_PER_SPLIT = 128
_MAX_SPLITS = 64
SPLIT_OPTIONS = Options(num_warps=4, num_stages=2, max_registers=255)
EXPAND_OPTIONS = Options(num_warps=4, num_stages=1)


@triton.jit
def _uniform_attention_kernel(
    q_ptr,  # mean queries [samples, heads, HEAD_DIM], contiguous
    k_ptr,
    v_ptr,
    mask_ptr,
    partial_ptr,  # float32 [samples * heads, splits, HEAD_DIM + 2]
    samples_ptr,  # int32 [samples]
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
    stride_mn,
    heads,
    keys,
    keys_per_split,
    splits,
    scale,  # of the logits, times log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
    WIDE: tl.constexpr,
):
    if WIDE:
        stride_kn, stride_kd = tl.cast(stride_kn, tl.int64), tl.cast(stride_kd, tl.int64)
        stride_vn, stride_vd = tl.cast(stride_vn, tl.int64), tl.cast(stride_vd, tl.int64)
    row = tl.program_id(0)
    split = tl.program_id(1)
    sample = tl.load(samples_ptr + row // heads).to(tl.int64)
    head = tl.cast(row % heads, tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + row * HEAD_DIM + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)  # [BLOCK_D]
    k_ptr += sample * stride_kb + head * stride_kh
    v_ptr += sample * stride_vb + head * stride_vh
    mask_ptr += sample * stride_mb + head * stride_mh

    first = split * keys_per_split
    stop = tl.minimum(first + keys_per_split, keys)
    row_max = tl.full([1], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([1], dtype=tl.float32)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for n in range(first, stop, BLOCK_N):
        mask_n = n + offs_n < stop
        k_tile = k_ptr + tl.cast(n, tl.int64) * stride_kn
        v_tile = v_ptr + tl.cast(n, tl.int64) * stride_vn
        k = load_tile(k_tile, offs_n, mask_n, stride_kn, stride_kd, 0, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        logits = tl.sum(k.to(tl.float32) * q[None, :], axis=1) * scale  # [BLOCK_N]
        if MASK == 1:
            bias = tl.load(mask_ptr + tl.cast(n + offs_n, tl.int64) * stride_mn, mask=mask_n, other=0.0)
            logits += log2_bias(bias)
        if MASK == 2:
            takes_part = tl.load(mask_ptr + tl.cast(n + offs_n, tl.int64) * stride_mn, mask=mask_n, other=0)
            logits = tl.where(takes_part != 0, logits, float("-inf"))
        logits = tl.where(mask_n, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=0))  # [1]
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.math.exp2(logits - shift)  # [BLOCK_N]
        factor = tl.math.exp2(row_max - shift)
        v = load_tile(v_tile, offs_n, mask_n, stride_vn, stride_vd, 0, HEAD_DIM, BLOCK_D, True)
        acc = acc * factor + tl.sum(weights[:, None] * v.to(tl.float32), axis=0)
        row_sum = row_sum * factor + tl.sum(weights, axis=0)
        row_max = new_max

    partial_ptr += (tl.cast(row, tl.int64) * splits + split) * (HEAD_DIM + 2)
    tl.store(partial_ptr + offs_d, acc, mask=offs_d < HEAD_DIM)
    tl.store(partial_ptr + HEAD_DIM + tl.arange(0, 1), row_max)
    tl.store(partial_ptr + HEAD_DIM + 1 + tl.arange(0, 1), row_sum)


@triton.jit
def _expand_rows_kernel(
    partial_ptr,  # float32 [samples * heads, splits, HEAD_DIM + 2]
    out_ptr,
    lse_ptr,  # float32 [batch, heads, tokens], contiguous
    samples_ptr,  # int32 [samples]
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    heads,
    tokens,
    grid_start,
    grid_tokens,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_LSE: tl.constexpr,
    WIDE: tl.constexpr,
):
    if WIDE:
        stride_on, stride_od = tl.cast(stride_on, tl.int64), tl.cast(stride_od, tl.int64)
    row = tl.program_id(0)
    tile = tl.program_id(1)
    sample = tl.load(samples_ptr + row // heads).to(tl.int64)
    head = tl.cast(row % heads, tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_t = tl.arange(0, BLOCK_T)
    mask_s = offs_s < splits
    partial_ptr += tl.cast(row, tl.int64) * splits * (HEAD_DIM + 2)
    acc = load_tile(partial_ptr, offs_s, mask_s, HEAD_DIM + 2, 1, 0, HEAD_DIM, BLOCK_D, True)  # [BLOCK_S, BLOCK_D]
    maxima = tl.load(partial_ptr + offs_s * (HEAD_DIM + 2) + HEAD_DIM, mask=mask_s, other=float("-inf"))
    sums = tl.load(partial_ptr + offs_s * (HEAD_DIM + 2) + HEAD_DIM + 1, mask=mask_s, other=0.0)
    row_max = tl.max(maxima, axis=0)
    factor = tl.math.exp2(maxima - tl.where(row_max == float("-inf"), 0.0, row_max))  # [BLOCK_S]
    row_sum = tl.sum(sums * factor, axis=0)
    out_row = tl.sum(acc * factor[:, None], axis=0) * tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)  # [BLOCK_D]

    start = tile * BLOCK_T
    mask_t = start + offs_t < grid_tokens
    token = tl.cast(grid_start + start, tl.int64)
    out_tile = out_ptr + sample * stride_ob + head * stride_oh + token * stride_on
    rows = tl.broadcast_to(out_row[None, :], [BLOCK_T, BLOCK_D])
    store_tile(out_tile, rows, offs_t, mask_t, stride_on, stride_od, 0, HEAD_DIM, BLOCK_D)
    if WITH_LSE:
        lse = tl.zeros([BLOCK_T], dtype=tl.float32) + (row_max + tl.math.log2(row_sum)) * LN2
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
    """Write the image tokens of ``samples``; ``attn_mask`` must not differ between queries."""
    heads, head_dim = query.shape[1], query.shape[3]
    rows = len(samples)
    query_rows = torch.cat(
        [
            query[first : last + 1, :, grid.start : grid.stop].mean(dim=2, dtype=torch.float32)
            for first, last in _consecutive(samples)
        ]
    ).to(query.dtype)
    sample_index = index_tensor(samples, query.device)
    keys = key.shape[2]
    splits = min(_MAX_SPLITS, triton.cdiv(keys, _KEYS_PER_SPLIT))
    keys_per_split = triton.cdiv(triton.cdiv(keys, splits), _BLOCK_N) * _BLOCK_N
    splits = triton.cdiv(keys, keys_per_split)
    block_d = triton.next_power_of_2(head_dim)
    mask, mask_kind, (stride_mb, stride_mh, _, stride_mn) = mask_arguments(attn_mask, out)
    partial = torch.empty(rows * heads, splits, head_dim + 2, dtype=torch.float32, device=query.device)
    with device_guard(query.device):
        _uniform_attention_kernel[(rows * heads, splits)](
            query_rows,
            key,
            value,
            mask,
            partial,
            sample_index,
            *key.stride(),
            *value.stride(),
            stride_mb,
            stride_mh,
            stride_mn,
            heads,
            keys,
            keys_per_split,
            splits,
            scale * LOG2E.value,
            HEAD_DIM=head_dim,
            BLOCK_N=_BLOCK_N,
            BLOCK_D=block_d,
            MASK=mask_kind,
            WIDE=strides_are_wide(key, value),
            **compile_options(SPLIT_OPTIONS),
        )
        _expand_rows_kernel[(rows * heads, triton.cdiv(grid.tokens, _BLOCK_TOKENS))](
            partial,
            out,
            out if lse is None else lse,
            sample_index,
            *out.stride(),
            heads,
            out.shape[2],
            grid.start,
            grid.tokens,
            splits,
            HEAD_DIM=head_dim,
            BLOCK_S=triton.next_power_of_2(splits),
            BLOCK_T=_BLOCK_TOKENS,
            BLOCK_D=block_d,
            WITH_LSE=lse is not None,
            WIDE=strides_are_wide(out),
            **compile_options(EXPAND_OPTIONS),
        )


def _consecutive(samples: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last index of every run of consecutive samples, so that each is one slice."""
    firsts = [i for i in samples if i - 1 not in samples]
    lasts = [i for i in samples if i + 1 not in samples]
    return list(zip(firsts, lasts, strict=True))
