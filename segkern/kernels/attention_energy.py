# SPDX-License-Identifier: Apache-2.0
r"""Energies of query rows, and the statistics that convert a row's logits to probabilities. No values are read.

Mathematics, for the rows ``q`` of one sample and head, which are blurred if the sample is blurred::

    m[i] = max_j q[i] k[j]^T                                  (not scaled)
    s[i] = sum_j exp(scale * (q[i] k[j]^T - m[i]))
    energy[i] = -(scale * m[i] + log(s[i])) = -logsumexp(scale * q[i] k^T)

Launch grid: one program per (sample, head, share of the keys, tile of BLOCK_M rows), with tiles adjacent to share the
head's keys in L2. A program loops over its keys in blocks of BLOCK_N with an online softmax. Keys are split into shares
only for few rows, such as the single row at infinite sigma; PyTorch combines the energies of the shares.

Memory traffic per head: Q once per share, K once per tile from L2, one float32 per row and share (two for
statistics).

The maximum is subtracted before scaling, so the largest logit gives exactly exp(0), however large it is.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._blur_matrices import index_tensor
from segkern.kernels._configs import architecture, key_splits, multiprocessors, scores_tile
from segkern.kernels._launch import launching, strides_are_wide, tile_constants
from segkern.kernels._primitives import LN2, LOG2E, from_row, load_parts, matrix, multiply_tiles
from segkern.kernels.gaussian_blur import blurred_image
from segkern.kernels.split_attention import mean_query


@triton.jit(do_not_specialize=["stride_ob", "stride_oh", "stride_os"])
def _attention_energy_kernel(
    q_ptr,
    k_ptr,
    out_ptr,  # float32: energies, or 1 / s
    max_ptr,  # float32: m, with STATISTICS; strides of out
    samples_ptr,  # int32 [samples], samples of keys and results
    query_samples_ptr,  # int32 [samples], samples of queries
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_ob,
    stride_oh,
    stride_os,  # stride of a share of the keys
    heads,
    rows,
    keys,
    keys_per_split,
    splits,
    scale,  # factor of the logits, times log2(e); positive
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides keys_per_split
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    start_m = tl.cast((pid % tiles) * BLOCK_M, tl.int64)
    split = (pid // tiles) % splits
    head_of_sample = pid // (tiles * splits)
    head = tl.cast(head_of_sample % heads, tl.int64)
    sample = tl.load(samples_ptr + head_of_sample // heads).to(tl.int64)
    query_sample = tl.load(query_samples_ptr + head_of_sample // heads).to(tl.int64)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = start_m + offs_m < rows
    q = matrix(q_ptr + query_sample * stride_qb + head * stride_qh, stride_qn, stride_qd, WIDE)
    k = matrix(k_ptr + sample * stride_kb + head * stride_kh, stride_kn, stride_kd, WIDE)
    q_tile, q_rest = load_parts(from_row(q, start_m), offs_m, mask_m, HEAD_DIM, BLOCK_D, BLOCK_R, True)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    first = split * keys_per_split
    stop = tl.minimum(first + keys_per_split, keys)
    full = tl.minimum(stop, keys - keys % BLOCK_N)
    for TAIL in tl.static_range(0, 2):  # whole blocks, then the remainder
        for n in tl.range(full if TAIL else first, stop if TAIL else full, BLOCK_N):
            mask_n = n + offs_n < keys
            k_tile, k_rest = load_parts(from_row(k, n), offs_n, mask_n, HEAD_DIM, BLOCK_D, BLOCK_R, TAIL == 1)
            products = multiply_tiles(q_tile, q_rest, k_tile, k_rest, BLOCK_R, PRECISION)  # [BLOCK_M, BLOCK_N]
            if TAIL:
                products = tl.where(mask_n[None, :], products, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(products, axis=1))
            factor = tl.math.exp2((row_max - new_max) * scale)
            row_sum = row_sum * factor + tl.sum(tl.math.exp2((products - new_max[:, None]) * scale), axis=1)
            row_max = new_max

    offset = sample * stride_ob + head * stride_oh + split * tl.cast(stride_os, tl.int64) + start_m
    if STATISTICS:
        tl.store(max_ptr + offset + offs_m, row_max, mask=mask_m)
        tl.store(out_ptr + offset + offs_m, 1.0 / row_sum, mask=mask_m)
    else:
        energy = -(row_max * scale + tl.math.log2(row_sum)) * LN2
        tl.store(out_ptr + offset + offs_m, energy, mask=mask_m)


def launch_attention_energy(
    query: torch.Tensor,
    key: torch.Tensor,
    out: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    boundary: str,
) -> None:
    """Write energies to ``out``, float32 ``[batch, heads, tokens]`` with contiguous tokens.

    Queries with a finite sigma are blurred by the separable kernel first. Samples with infinite sigma have one row for
    their image; their tokens outside the grid are ordinary rows.
    """
    if query.numel() == 0:
        return
    query, scale = positive_scale(query, scale)
    batch = range(len(sigmas))
    plain = tuple(i for i in batch if sigmas[i] == 0.0)
    finite = tuple(i for i in batch if 0.0 < sigmas[i] < math.inf)
    uniform = tuple(i for i in batch if math.isinf(sigmas[i]))
    image = slice(grid.start, grid.stop)
    if plain:
        _launch(query, plain, key, out, plain, scale)
    if finite:
        blurred = blurred_image(query, grid, sigmas, finite, boundary).transpose(1, 2)
        _launch(blurred, tuple(range(len(finite))), key, out[:, :, image], finite, scale)
    if uniform:
        rows, query_samples = mean_query(query, grid, uniform)
        energies = out.new_empty(*out.shape[:2], 1)
        _launch(rows, query_samples, key, energies, uniform, scale)
        for i in uniform:
            out[i, :, image] = energies[i]
    for outside in (slice(0, grid.start), slice(grid.stop, query.shape[2])):
        others = tuple(sorted(finite + uniform))
        if others and outside.start < outside.stop:
            _launch(query[:, :, outside], others, key, out[:, :, outside], others, scale)


def positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Return query and scale with unchanged logits and a positive scale; kernels compute the maximum before scaling."""
    if scale > 0.0:
        return query, scale
    return (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)


def launch_statistics(
    query: torch.Tensor, key: torch.Tensor, maxima: torch.Tensor, inverse_sums: torch.Tensor, scale: float
) -> None:
    """Write ``m`` and ``1 / s`` of every row, float32 ``[batch, heads, tokens]``, contiguous."""
    samples = tuple(range(query.shape[0]))
    _launch(query, samples, key, inverse_sums, samples, scale, maxima)


def _launch(
    query: torch.Tensor,  # [any, heads, rows, head_dim]
    query_samples: tuple[int, ...],
    key: torch.Tensor,
    out: torch.Tensor,
    samples: tuple[int, ...],
    scale: float,
    maxima: torch.Tensor | None = None,
) -> None:
    _, heads, rows, head_dim = query.shape
    keys = key.shape[2]
    tile = scores_tile(architecture(query.device), head_dim, query.dtype)
    programs = -(-rows // tile.block_m) * heads * len(samples)
    splits, keys_per_split = 1, keys
    if maxima is None:
        splits, keys_per_split = key_splits(programs, keys, tile.block_n, multiprocessors(query.device))
    shares = out[:, :, None] if splits == 1 else out.new_empty(out.shape[0], heads, splits, rows)
    with launching(query.device):
        _attention_energy_kernel[(programs * splits,)](
            query,
            key,
            shares,
            shares if maxima is None else maxima,
            index_tensor(samples, query.device),
            index_tensor(query_samples, query.device),
            *query.stride(),
            *key.stride(),
            *shares.stride()[:3],
            heads,
            rows,
            keys,
            keys_per_split,
            splits,
            scale * LOG2E.value,
            STATISTICS=maxima is not None,
            WIDE=strides_are_wide(query.stride(), key.stride()),
            **tile_constants(tile, head_dim, query.dtype),
        )
    if splits > 1:
        for i in samples:
            out[i] = -torch.logsumexp(-shares[i], dim=1)
