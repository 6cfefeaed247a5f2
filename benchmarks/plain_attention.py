# SPDX-License-Identifier: Apache-2.0
"""Common Triton attention kernels, compiled to compare instruction counts with ours. They are never launched.

One kernel in two styles: that of Triton's tutorial, which folds the scale into the exponentials, and that of the
template of PyTorch's FlexAttention, which scales scores before the softmax and guards rows without keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _plain_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stride_b,  # equal for all four tensors
    stride_h,
    stride_n,
    heads,
    tokens,
    scale,  # factor of the logits, times log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLEX: tl.constexpr,
):
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    first = (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    offs_m, offs_n, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    rows = first + offs_m[:, None] * stride_n + offs_d[None, :]
    keys = first + offs_n[:, None] * stride_n + offs_d[None, :]
    q = tl.load(q_ptr + rows)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    for _ in range(0, tokens, BLOCK_N):
        scores = tl.dot(q, tl.trans(tl.load(k_ptr + keys)))
        if FLEX:
            scores *= scale
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights = tl.math.exp2(scores - shift[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            shift = new_max
            weights = tl.math.exp2(scores * scale - new_max[:, None])
        factor = tl.math.exp2(row_max - shift)
        row_sum = row_sum * factor + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), tl.load(v_ptr + keys), acc * factor[:, None])
        row_max = new_max
        keys += BLOCK_N * stride_n
    tl.store(out_ptr + rows, (acc / row_sum[:, None]).to(q.dtype))
