# SPDX-License-Identifier: Apache-2.0
r"""The separable blur on its own: one axis per launch.

Mathematics, for one sample and head, columns first and rows second::

    y[i, j] = sum_l B_w[j, l] x[i, l]        z[i, j] = sum_k B_h[i, k] y[k, j]

Launch grid: one program per (sample, head, line of the other axis, block of BLOCK_I tokens of the axis). A line of n
tokens is a product of an [n, n] matrix, of which only the band within reach is read, with [n, dim].

Memory traffic per head: x once, float32 y written and read once, z once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._blur_matrices import blur_matrices, consecutive
from segkern.kernels._configs import Options, blur_precision
from segkern.kernels._launch import compile_options, launching, next_power_of_2, strides_are_wide
from segkern.kernels._primitives import load_tile, matrix, store_tile

BLOCK_I = 32
BLOCK_J = 32
_BLOCK_D = 64


@triton.jit
def _gaussian_blur_kernel(
    x_ptr,
    out_ptr,
    index_ptr,  # int32 [batch], of its matrix; negative: copied
    weights_ptr,  # float32 [T, length, length]
    reach_ptr,  # int32 [T, 2], offset to this axis
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    heads,
    lines,
    length,
    line_step,  # tokens from one line to the next
    axis_step,  # tokens from one token of a line to the next
    HEAD_DIM: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(length, BLOCK_I)
    start_i = (pid % blocks) * BLOCK_I
    line = tl.cast((pid // blocks) % lines, tl.int64)
    head = tl.cast((pid // (blocks * lines)) % heads, tl.int64)
    sample = tl.cast(pid // (blocks * lines * heads), tl.int64)
    index = tl.load(index_ptr + sample)
    offs_i = start_i + tl.arange(0, BLOCK_I)
    mask_i = offs_i < length
    x_ptr += sample * stride_xb + head * stride_xh + line * line_step * stride_xn
    out_ptr += sample * stride_ob + head * stride_oh + line * line_step * stride_on
    step = tl.cast(axis_step, tl.int64)
    x_line = matrix(x_ptr, step * stride_xn, stride_xd, WIDE)
    out_line = matrix(out_ptr, step * stride_on, stride_od, WIDE)

    if index < 0:
        for first_d in tl.static_range(0, HEAD_DIM, BLOCK_D):
            x = load_tile(x_line, offs_i, mask_i, first_d, HEAD_DIM, BLOCK_D, True)
            store_tile(out_line, x, offs_i, mask_i, first_d, HEAD_DIM, BLOCK_D)
    else:
        weights_ptr += index * length * length
        reach = tl.load(reach_ptr + 2 * index)
        first_j = tl.maximum(start_i - reach, 0)
        last_j = tl.minimum(start_i + BLOCK_I + reach, length)
        for first_d in tl.static_range(0, HEAD_DIM, BLOCK_D):
            acc = tl.zeros([BLOCK_I, BLOCK_D], dtype=tl.float32)
            for j in range(first_j, last_j, BLOCK_J):
                offs_j = j + tl.arange(0, BLOCK_J)
                mask_j = offs_j < length
                weights = tl.load(  # [BLOCK_I, BLOCK_J]
                    weights_ptr + offs_i[:, None] * length + offs_j[None, :],
                    mask=mask_i[:, None] & mask_j[None, :],
                    other=0.0,
                )
                x = load_tile(x_line, offs_j, mask_j, first_d, HEAD_DIM, BLOCK_D, True)
                acc = tl.dot(weights, x.to(tl.float32), acc, input_precision=PRECISION)  # [BLOCK_I, BLOCK_D]
            store_tile(out_line, acc, offs_i, mask_i, first_d, HEAD_DIM, BLOCK_D)


def blur_options(dtype: torch.dtype) -> Options:
    """The compiler's options.

    Products of half precision spill unless it is told how many registers there are, those of float32 with 4 warps.
    """
    if dtype.itemsize == 2:
        return Options(num_warps=4, num_stages=2, max_registers=255)
    return Options(num_warps=8, num_stages=2)


def blur_block_d(head_dim: int) -> int:
    """Channels a program blurs at a time."""
    return min(_BLOCK_D, max(16, next_power_of_2(head_dim)))


def launch_gaussian_blur(
    x: torch.Tensor,
    out: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    boundary: str,
    adjoint: bool = False,
) -> None:
    """Write ``x`` blurred over the grid to ``out``; tokens outside the grid are copied."""
    if x.numel() == 0:
        return
    batch, heads, tokens, head_dim = x.shape
    matrices = blur_matrices(tuple(range(batch)), sigmas, grid.height, grid.width, boundary, x.device, adjoint)
    for outside in (slice(0, grid.start), slice(grid.stop, tokens)):
        if outside.start < outside.stop:
            out[:, :, outside] = x[:, :, outside]
    image, out_image = x[:, :, grid.start : grid.stop], out[:, :, grid.start : grid.stop]
    halfway = torch.empty(batch, grid.tokens, heads, head_dim, dtype=torch.float32, device=x.device).transpose(1, 2)
    axes = (
        (image, halfway, matrices.columns, matrices.reach[:, 1:], grid.height, grid.width, grid.width, 1),
        (halfway, out_image, matrices.rows, matrices.reach, grid.width, grid.height, 1, grid.width),
    )
    with launching(x.device):
        for source, target, weights, reach, lines, length, line_step, axis_step in axes:
            programs = -(-length // BLOCK_I) * lines * heads * batch
            _gaussian_blur_kernel[(programs,)](
                source,
                target,
                matrices.index,
                weights,
                reach,
                *source.stride(),
                *target.stride(),
                heads,
                lines,
                length,
                line_step,
                axis_step,
                HEAD_DIM=head_dim,
                BLOCK_I=BLOCK_I,
                BLOCK_J=BLOCK_J,
                BLOCK_D=blur_block_d(head_dim),
                PRECISION=blur_precision(x.dtype),
                WIDE=strides_are_wide(source.stride(), target.stride()),
                **compile_options(blur_options(x.dtype)),
            )


def blurred_image(
    query: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], samples: tuple[int, ...], boundary: str
) -> torch.Tensor:
    """The blurred image tokens of some samples, ``[samples, grid tokens, heads, head_dim]``, contiguous."""
    _, heads, _, head_dim = query.shape
    image = query.new_empty(len(samples), grid.tokens, heads, head_dim)
    filled = 0
    for run in consecutive(samples):
        count = run.stop - run.start
        target = image[filled : filled + count].transpose(1, 2)
        source = query[run, :, grid.start : grid.stop]
        launch_gaussian_blur(source, target, Grid(grid.height, grid.width), sigmas[run], boundary)
        filled += count
    return image
