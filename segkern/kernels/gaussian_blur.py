# SPDX-License-Identifier: Apache-2.0
r"""The separable blur as a separate kernel: both axes in one launch in half precision, one axis per launch in float32.

Mathematics, for one sample and head, columns first, then rows::

    y[i, j] = sum_l B_w[j, l] x[i, l]        z[i, j] = sum_k B_h[i, k] y[k, j]

Half precision: a program has a tile of rows and columns and some channels. It loops over blocks of the source rows
within reach. For each block it computes y of its columns, a product of [columns, source columns] with [source columns,
source rows * channels], transposes it in shared memory, and adds a product of [rows, source rows] with [source rows,
columns * channels] to z. Weights and y are pairs of numbers of the input's dtype, high and low (``_blur_matrices.py``),
so the products use the dtype's matrix instructions, summed in float32. Of the four products of two pairs, the product
of the low halves is omitted: it is below the resolution of float32 sums. Launch grid: channels, columns, rows, heads,
samples.

Float32: a blurred line of n tokens is the product of an [n, n] matrix with [n, dim]. Only the matrix's band within
reach is read. Launch grid: one program per (sample, head, line of the other axis, block of BLOCK_I tokens of the axis).

Memory traffic per head: half precision reads x once per tile of columns and rows, from L2, and writes z once. Float32
reads x once, writes and reads y once, and writes z once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkern.grid import Grid
from segkern.kernels._blur_matrices import PLANE_SCALE, PLANE_STEP, blur_matrices, consecutive
from segkern.kernels._configs import Options, architecture
from segkern.kernels._launch import compile_options, launch, launching, next_power_of_2, strides_are_wide
from segkern.kernels._primitives import from_row, load_tile, matrix, store_tile

BLOCK_I = 32
BLOCK_J = 32
_BLOCK_D = 64

_TILE_ROWS = tl.constexpr(32)  # Hopper's matrix instructions for 64 rows or more need far more registers
_TILE_COLUMNS = tl.constexpr(16)
_SOURCE_ROWS = tl.constexpr(16)
TILE_CHANNELS = tl.constexpr(16)  # one memory sector
_PLANE_STEP = tl.constexpr(PLANE_STEP)
_ADJOINT_HALVING = 0.25  # columns of a blur matrix sum to at most 3, so transposed blurs might exceed float16


@triton.jit
def _split_numbers(x, dtype: tl.constexpr):
    """Split float32 into a high and a low half of a dtype."""
    if dtype == tl.bfloat16:  # truncates, because rounding and widening the rounded number take many cycles
        high = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        high = x.to(dtype).to(tl.float32)
    return high.to(dtype), (x - high).to(dtype)


@triton.jit
def _add_rows(acc, weights_ptrs, plane, high, low):
    """Return ``acc`` plus the product of weights in two planes with rows in two halves."""
    high_weights = tl.load(weights_ptrs)
    low_weights = tl.load(weights_ptrs + plane)
    acc = tl.dot(high_weights, high, acc)
    acc = tl.dot(high_weights, low, acc)
    return tl.dot(low_weights, high, acc)


@triton.jit
def _tile_of_image(x, start_i, start_j, first_d, height, width, HEAD_DIM: tl.constexpr):
    """Return offsets from the first token, and the mask, of a tile ``[rows, columns * channels]``."""
    offs_i = tl.arange(0, _TILE_ROWS)
    offs_jd = tl.arange(0, _TILE_COLUMNS * TILE_CHANNELS)  # channels of a token are adjacent
    offs_j = offs_jd // TILE_CHANNELS
    offs_d = first_d + offs_jd % TILE_CHANNELS
    offs = (offs_i * width)[:, None] * x.row_stride + (offs_j * x.row_stride + offs_d * x.column_stride)[None, :]
    inside = (start_j + offs_j < width) & (offs_d < HEAD_DIM)
    return offs, (start_i + offs_i < height)[:, None] & inside[None, :]


@triton.jit
def _store_tile_of_image(out, tile, start_i, start_j, first_d, height, width, HEAD_DIM: tl.constexpr):
    """Write a tile in the pointer's dtype."""
    offs, mask = _tile_of_image(out, start_i, start_j, first_d, height, width, HEAD_DIM)
    first = from_row(out, tl.cast(start_i, tl.int64) * width + start_j)
    tl.store(first.ptr + offs, tile.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _image_blur_kernel(
    x_ptr,
    out_ptr,  # only the blurred samples, in their order
    samples_ptr,  # int32 [samples], samples of x
    index_ptr,  # int32 [samples], matrix of each sample; negative: copied
    row_weights_ptr,  # planes [T, 2, n, n] in the dtype of x, n the height padded to a multiple of _PLANE_STEP
    column_weights_ptr,  # planes for the width
    reach_ptr,  # int32 [T, 2]
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    heads,
    height,
    width,
    halfway_scale,  # undoes the scale of the column weights
    out_scale,  # undoes the scale of the row weights
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,  # tiles of rows per program, 1 or 2
    BLOCK_C: tl.constexpr,  # source columns at a time
    ONE_BLOCK: tl.constexpr,  # whether the width is at most BLOCK_C
    WIDE: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BLOCK_I: tl.constexpr = _TILE_ROWS
    BLOCK_J: tl.constexpr = _TILE_COLUMNS
    BLOCK_R: tl.constexpr = _SOURCE_ROWS
    BLOCK_D: tl.constexpr = TILE_CHANNELS
    channel_blocks: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    first_d = (pid % channel_blocks) * BLOCK_D
    pid = pid // channel_blocks
    blocks = tl.cdiv(width, BLOCK_J)
    start_j = (pid % blocks) * BLOCK_J
    pid = pid // blocks
    blocks = tl.cdiv(height, PARTS * BLOCK_I)
    start_i = (pid % blocks) * PARTS * BLOCK_I
    pid = pid // blocks
    head = tl.cast(pid % heads, tl.int64)
    slot = pid // heads
    sample = tl.load(samples_ptr + slot).to(tl.int64)
    index = tl.load(index_ptr + slot)

    x = matrix(x_ptr + sample * stride_xb + head * stride_xh, stride_xn, stride_xd, WIDE)
    out = matrix(out_ptr + tl.cast(slot, tl.int64) * stride_ob + head * stride_oh, stride_on, stride_od, WIDE)
    if index < 0:
        for part in tl.static_range(PARTS):
            first_i = start_i + part * BLOCK_I
            offs, mask = _tile_of_image(x, first_i, start_j, first_d, height, width, HEAD_DIM)
            tile = tl.load(from_row(x, tl.cast(first_i, tl.int64) * width + start_j).ptr + offs, mask=mask)
            _store_tile_of_image(out, tile, first_i, start_j, first_d, height, width, HEAD_DIM)
    else:
        row_reach, column_reach = tl.load(reach_ptr + 2 * index), tl.load(reach_ptr + 2 * index + 1)
        rows_length = tl.cdiv(height, _PLANE_STEP) * _PLANE_STEP
        columns_length = tl.cdiv(width, _PLANE_STEP) * _PLANE_STEP
        row_plane, column_plane = rows_length * rows_length, columns_length * columns_length
        offs_c = tl.arange(0, BLOCK_C)
        offs_r = tl.arange(0, BLOCK_R)
        row_weights = row_weights_ptr + index * 2 * row_plane
        row_weights += (start_i + tl.arange(0, BLOCK_I))[:, None] * rows_length + offs_r[None, :]
        column_weights = column_weights_ptr + index * 2 * column_plane
        column_weights += (start_j + tl.arange(0, BLOCK_J))[:, None] * columns_length + offs_c[None, :]
        offs_rd = tl.arange(0, BLOCK_R * BLOCK_D)
        in_r = offs_rd // BLOCK_D
        in_d = first_d + offs_rd % BLOCK_D
        offs_x = (in_r * width * x.row_stride + in_d * x.column_stride)[None, :] + (offs_c * x.row_stride)[:, None]
        first_row = tl.maximum(start_i - row_reach, 0) // BLOCK_R * BLOCK_R
        last_row = tl.minimum(start_i + PARTS * BLOCK_I + row_reach, height)
        first_column = tl.maximum(start_j - column_reach, 0) // BLOCK_C * BLOCK_C
        last_column = tl.minimum(start_j + BLOCK_J + column_reach, width)
        acc = tl.zeros([BLOCK_I, BLOCK_J * BLOCK_D], dtype=tl.float32)
        rest = 0.0
        if PARTS == 2:
            rest = tl.zeros([BLOCK_I, BLOCK_J * BLOCK_D], dtype=tl.float32)
        if ONE_BLOCK:
            high_weights = tl.load(column_weights)
            low_weights = tl.load(column_weights + column_plane)
        for r in range(first_row, last_row, BLOCK_R):
            mask_rd = (r + in_r < height) & (in_d < HEAD_DIM)
            rows = from_row(x, tl.cast(r, tl.int64) * width)
            y = tl.zeros([BLOCK_J, BLOCK_R * BLOCK_D], dtype=tl.float32)
            if ONE_BLOCK:
                tokens = tl.load(rows.ptr + offs_x, mask=mask_rd[None, :] & (offs_c < width)[:, None], other=0.0)
                y = tl.dot(high_weights, tokens, y)
                y = tl.dot(low_weights, tokens, y)
            else:
                for c in range(first_column, last_column, BLOCK_C):
                    mask = mask_rd[None, :] & (c + offs_c < width)[:, None]
                    tokens = tl.load(from_row(rows, c).ptr + offs_x, mask=mask, other=0.0)
                    y = tl.dot(tl.load(column_weights + c), tokens, y)
                    y = tl.dot(tl.load(column_weights + c + column_plane), tokens, y)
            if dtype == tl.float16:
                y *= halfway_scale
            y = tl.permute(tl.reshape(y, [BLOCK_J, BLOCK_R, BLOCK_D]), (1, 0, 2))
            high, low = _split_numbers(tl.reshape(y, [BLOCK_R, BLOCK_J * BLOCK_D]), dtype)
            acc = _add_rows(acc, row_weights + r, row_plane, high, low)
            if PARTS == 2:
                rest = _add_rows(rest, row_weights + (r + BLOCK_I * rows_length), row_plane, high, low)
        _store_tile_of_image(out, acc * out_scale, start_i, start_j, first_d, height, width, HEAD_DIM)
        if PARTS == 2:
            rest *= out_scale
            _store_tile_of_image(out, rest, start_i + BLOCK_I, start_j, first_d, height, width, HEAD_DIM)


@triton.jit
def _axis_blur_kernel(
    x_ptr,
    out_ptr,
    index_ptr,  # int32 [batch], matrix of each sample; negative: copied
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
                acc = tl.dot(weights, x, acc, input_precision="ieee")  # [BLOCK_I, BLOCK_D]
            store_tile(out_line, acc, offs_i, mask_i, first_d, HEAD_DIM, BLOCK_D)


def blur_block_d(head_dim: int) -> int:
    """Return how many channels a program of the float32 kernel blurs at a time."""
    return min(_BLOCK_D, max(16, next_power_of_2(head_dim)))


def image_constants(height: int, width: int) -> dict[str, int | bool]:
    """Return the half-precision kernel's constants for a grid: tiles of rows per program, source columns per step."""
    return {
        "PARTS": 1 if height <= _TILE_ROWS.value else 2,
        "BLOCK_C": 64 if 32 < width <= 64 else 32,
        "ONE_BLOCK": width <= 64,
    }


def image_options(height: int, width: int, hip: bool) -> Options:
    """Return the compiler options of the half-precision kernel. An NVIDIA multiprocessor holds 16 of its warps."""
    return Options(num_warps=8 if hip or max(height, width) <= 32 else 16, num_stages=2)


def launch_gaussian_blur(
    x: torch.Tensor,
    out: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    boundary: str,
    adjoint: bool = False,
) -> None:
    """Write ``x`` blurred over the grid to ``out``. Tokens outside the grid are copied."""
    if x.numel() == 0:
        return
    batch, _, tokens, _ = x.shape
    for outside in (slice(0, grid.start), slice(grid.stop, tokens)):
        if outside.start < outside.stop:
            out[:, :, outside] = x[:, :, outside]
    image, out_image = x[:, :, grid.start : grid.stop], out[:, :, grid.start : grid.stop]
    if x.dtype.itemsize == 2:
        _blur_images(image, out_image, grid, sigmas, tuple(range(batch)), boundary, adjoint)
    else:
        _blur_axes(image, out_image, grid, sigmas, boundary, adjoint)


def _blur_images(
    image: torch.Tensor,
    out: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    samples: tuple[int, ...],
    boundary: str,
    adjoint: bool,
) -> None:
    """Write some blurred samples of a batch of images to ``out``. ``sigmas`` has one entry for each of them."""
    _, heads, _, head_dim = image.shape
    height, width = grid.height, grid.width
    matrices = blur_matrices(samples, sigmas, height, width, boundary, image.device, adjoint, planes=image.dtype)
    constants = image_constants(height, width)
    parts = int(constants["PARTS"])
    tiles = -(-height // (parts * _TILE_ROWS.value)) * -(-width // _TILE_COLUMNS.value)
    scale = 1.0 / PLANE_SCALE[image.dtype]
    halving = _ADJOINT_HALVING if adjoint and scale != 1.0 else 1.0
    programs = tiles * -(-head_dim // TILE_CHANNELS.value) * heads * len(samples)
    with launching(image.device):
        launch(
            _image_blur_kernel,
            programs,
            (image, out),
            (matrices.samples, matrices.index, matrices.rows, matrices.columns, matrices.reach),
            (*image.stride(), *out.stride(), heads, height, width, scale * halving, scale / halving),
            {
                "HEAD_DIM": head_dim,
                "WIDE": strides_are_wide(image.stride(), out.stride(), rows=64 * width),
                **constants,
                **compile_options(image_options(height, width, torch.version.hip is not None)),
            },
        )


def axis_options(arch: str) -> Options:
    """Return the float32 compiler options: 4 warps spill, and on sm_80 so do 8 if the compiler limits registers."""
    return Options(num_warps=8, num_stages=2, max_registers=168 if arch == "sm_80" else None)


def _blur_axes(
    image: torch.Tensor, out: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], boundary: str, adjoint: bool
) -> None:
    batch, heads, tokens, head_dim = image.shape
    matrices = blur_matrices(tuple(range(batch)), sigmas, grid.height, grid.width, boundary, image.device, adjoint)
    halfway = torch.empty(batch, tokens, heads, head_dim, dtype=torch.float32, device=image.device).transpose(1, 2)
    axes = (
        (image, halfway, matrices.columns, matrices.reach[:, 1:], grid.height, grid.width, grid.width, 1),
        (halfway, out, matrices.rows, matrices.reach, grid.width, grid.height, 1, grid.width),
    )
    with launching(image.device):
        for source, target, weights, reach, lines, length, line_step, axis_step in axes:
            programs = -(-length // BLOCK_I) * lines * heads * batch
            launch(
                _axis_blur_kernel,
                programs,
                (source, target),
                (matrices.index, weights, reach),
                (*source.stride(), *target.stride(), heads, lines, length, line_step, axis_step),
                {
                    "HEAD_DIM": head_dim,
                    "BLOCK_I": BLOCK_I,
                    "BLOCK_J": BLOCK_J,
                    "BLOCK_D": blur_block_d(head_dim),
                    "WIDE": strides_are_wide(source.stride(), target.stride()),
                    **compile_options(axis_options(architecture(image.device))),
                },
            )


def blurred_image(
    query: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], samples: tuple[int, ...], boundary: str
) -> torch.Tensor:
    """Return the blurred image tokens of some samples, ``[samples, grid tokens, heads, head_dim]``, contiguous."""
    _, heads, _, head_dim = query.shape
    image = query.new_empty(len(samples), grid.tokens, heads, head_dim)
    source, target = query[:, :, grid.start : grid.stop], image.transpose(1, 2)
    if query.dtype.itemsize == 2:
        _blur_images(source, target, grid, tuple(sigmas[i] for i in samples), samples, boundary, False)
        return image
    filled = 0
    for run in consecutive(samples):
        count = run.stop - run.start
        _blur_axes(source[run], target[filled : filled + count], grid, sigmas[run], boundary, False)
        filled += count
    return image
