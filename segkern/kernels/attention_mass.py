# SPDX-License-Identifier: Apache-2.0
r"""Attention probabilities summed over the queries, in two passes, without forming the matrix of probabilities.

Mathematics, for one sample and head::

    m[i], s[i] = row statistics, see attention_energy.py                       (pass one)
    mass[j] = sum_i exp(scale * (q[i] k[j]^T - m[i])) / s[i]                   (pass two)

Pass two swaps the roles of pass one: a program has a tile of keys and loops over the queries in blocks. It accumulates
probabilities in registers, one sum per key and position in a block, and reduces them once at the end. Every key has one
writer and one order of summation, so results are deterministic.

Launch grid of pass two: one program per (sample, head, share of the queries, tile of BLOCK_M keys), with tiles adjacent
to share the head's queries in L2. Queries are split into shares only for few keys, such as the keys of a text; PyTorch
sums the shares.

Memory traffic per head: K once per share, Q and two float32 per query once per tile from L2, one float32 per key and
share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkern.kernels._configs import architecture, key_splits, multiprocessors, scores_tile
from segkern.kernels._launch import launching, strides_are_wide, tile_constants
from segkern.kernels._primitives import LOG2E, from_row, load_parts, matrix, multiply_tiles
from segkern.kernels.attention_energy import launch_statistics, positive_scale


@triton.jit
def _attention_mass_kernel(
    q_ptr,
    k_ptr,
    max_ptr,  # float32 [batch, heads, queries], contiguous
    inverse_ptr,  # float32 [batch, heads, queries], contiguous
    out_ptr,  # float32 [splits, batch, heads, keys], contiguous
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    batch,
    heads,
    queries,
    keys,
    queries_per_split,
    splits,
    scale,  # factor of the logits, times log2(e); positive
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # keys
    BLOCK_N: tl.constexpr,  # queries; divides queries_per_split
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(keys, BLOCK_M)
    start_m = tl.cast((pid % tiles) * BLOCK_M, tl.int64)
    split = (pid // tiles) % splits
    head_of_sample = tl.cast(pid // (tiles * splits), tl.int64)
    head = head_of_sample % heads
    sample = head_of_sample // heads

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = start_m + offs_m < keys
    q = matrix(q_ptr + sample * stride_qb + head * stride_qh, stride_qn, stride_qd, WIDE)
    k = matrix(k_ptr + sample * stride_kb + head * stride_kh, stride_kn, stride_kd, WIDE)
    max_ptr += head_of_sample * queries
    inverse_ptr += head_of_sample * queries
    k_tile, k_rest = load_parts(from_row(k, start_m), offs_m, mask_m, HEAD_DIM, BLOCK_D, BLOCK_R, True)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    first = split * queries_per_split
    stop = tl.minimum(first + queries_per_split, queries)
    full = tl.minimum(stop, queries - queries % BLOCK_N)
    for TAIL in tl.static_range(0, 2):  # whole blocks, then the remainder
        for n in tl.range(full if TAIL else first, stop if TAIL else full, BLOCK_N):
            mask_n = n + offs_n < queries
            if TAIL:
                row_max = tl.load(max_ptr + n + offs_n, mask=mask_n, other=0.0)
                inverse = tl.load(inverse_ptr + n + offs_n, mask=mask_n, other=0.0)
            else:
                row_max = tl.load(max_ptr + n + offs_n)
                inverse = tl.load(inverse_ptr + n + offs_n)
            q_tile, q_rest = load_parts(from_row(q, n), offs_n, mask_n, HEAD_DIM, BLOCK_D, BLOCK_R, TAIL == 1)
            products = multiply_tiles(k_tile, k_rest, q_tile, q_rest, BLOCK_R, PRECISION)  # [BLOCK_M, BLOCK_N]
            # No probability may exceed 1, even if a product of huge numbers rounds differently than in pass one. Next
            # to a key of infinities, the padding has NaN. A device's minimum turns it into 0, with weight 0; NumPy's
            # minimum keeps it.
            exponents = tl.minimum((products - row_max[None, :]) * scale, 0.0)
            acc += tl.math.exp2(exponents) * inverse[None, :]

    out_ptr += (tl.cast(split, tl.int64) * batch * heads + head_of_sample) * keys + start_m
    tl.store(out_ptr + offs_m, tl.sum(acc, axis=1), mask=mask_m)


def launch_attention_mass(query: torch.Tensor, key: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """Write masses to ``out``, float32 ``[batch, heads, keys]``, contiguous."""
    batch, heads, queries, head_dim = query.shape
    if out.numel() == 0:
        return
    if queries == 0:
        out.zero_()
        return
    query, scale = positive_scale(query, scale)
    maxima, inverse_sums = query.new_empty(2, batch, heads, queries, dtype=torch.float32)
    launch_statistics(query, key, maxima, inverse_sums, scale)
    keys = key.shape[2]
    tile = scores_tile(architecture(query.device), head_dim, query.dtype)
    programs = -(-keys // tile.block_m) * heads * batch
    splits, queries_per_split = key_splits(programs, queries, tile.block_n, multiprocessors(query.device))
    shares = out[None] if splits == 1 else out.new_empty(splits, batch, heads, keys)
    with launching(query.device):
        _attention_mass_kernel[(programs * splits,)](
            query,
            key,
            maxima,
            inverse_sums,
            shares,
            *query.stride(),
            *key.stride(),
            batch,
            heads,
            queries,
            keys,
            queries_per_split,
            splits,
            scale * LOG2E.value,
            WIDE=strides_are_wide(query.stride(), key.stride()),
            **tile_constants(tile, head_dim, query.dtype),
        )
    if splits > 1:
        torch.sum(shares, dim=0, out=out)
