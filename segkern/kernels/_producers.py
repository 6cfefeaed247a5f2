# SPDX-License-Identifier: Apache-2.0
r"""The separable blur inside the attention's own launch, by programs that come before those of attention.

The launch's first programs, the producers, blur the queries of blurred samples: those of a first phase along the
width, those of a second one along the height. Tiles of samples that are not blurred follow, so that they hide the blur,
and last come tiles of blurred samples. Who needs a result waits for a counter of its sample and head.

A program only waits for programs of lower numbers. That devices start programs in the order of their numbers is
nowhere promised, but all NVIDIA devices are known to; then, when one waits, all that it waits for have started.

Counters, of a blurred sample and head: producers of the first phase that are done, producers of the second one, tiles
that have done with waiting. The last of those tiles sets all three back to zero, so that a launch finds them as the
one before did, and replays of a CUDA graph do as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from segkern.core.gaussian import table_making
from segkern.grid import Grid
from segkern.kernels._blur_tiles import blur_block
from segkern.kernels._configs import multiprocessors
from segkern.kernels._launch import next_power_of_2

COUNTERS = 3
_COUNTERS = tl.constexpr(COUNTERS)


@triton.jit
def wait_for(counter_ptr, wanted):
    """Until the counter is at ``wanted``; what was written before it was raised can be read then."""
    seen = 0  # asking once before the loop gave AMD's compiler a loop that some threads never left
    while seen < wanted:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire")


@triton.jit
def announce(counter_ptr):
    """Raise the counter, once all threads of the program have written what they had to."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def leave(counters_ptr, waiting):
    """Say that a tile has done with waiting; the last of ``waiting`` tiles sets the counters back."""
    left = tl.atomic_add(counters_ptr + 2, 1, sem="acq_rel")
    if left == waiting - 1:
        for i in tl.static_range(_COUNTERS):
            tl.store(counters_ptr + i, 0)


@triton.jit
def produce(
    pid,  # of the producers' programs of both phases
    q_ptr,
    samples_ptr,  # int32 [B], blurred samples
    tables_ptr,  # int32 [B], the matrix of each of them
    row_weights_ptr,  # float32 [T, height, height]
    column_weights_ptr,  # float32 [T, width, width]
    reach_ptr,  # int32 [T, 2]
    halfway_ptr,  # float32 [B, height * width, heads, HEAD_DIM], contiguous
    blurred_ptr,  # [B, height * width, heads, HEAD_DIM], contiguous
    counters_ptr,  # int32 [B, heads, 3]
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    heads,
    height,
    width,
    grid_start,
    producers,  # of a head, in each phase
    phase_programs,  # B * heads * producers
    HEAD_DIM: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One producer's lines of its sample and head: rows of the grid in the first phase, columns in the second."""
    part = pid % producers
    head_of_blurred = (pid % phase_programs) // producers
    head = tl.cast(head_of_blurred % heads, tl.int64)
    slot = tl.cast(head_of_blurred // heads, tl.int64)
    table = tl.load(tables_ptr + slot)
    counters_ptr += head_of_blurred * _COUNTERS
    stride_qn, stride_n = tl.cast(stride_qn, tl.int64), tl.cast(heads * HEAD_DIM, tl.int64)  # times a whole line
    image = slot * height * width * stride_n + head * HEAD_DIM
    if pid < phase_programs:
        sample = tl.load(samples_ptr + slot).to(tl.int64)
        x_ptr = q_ptr + sample * stride_qb + head * stride_qh + tl.cast(grid_start, tl.int64) * stride_qn
        reach = tl.load(reach_ptr + 2 * table + 1)
        for line in range(part, height, producers):
            first = tl.cast(line * width, tl.int64)
            for i in range(0, width, BLOCK_I):
                blur_block(
                    x_ptr + first * stride_qn,
                    halfway_ptr + image + first * stride_n,
                    column_weights_ptr + table * width * width,
                    reach,
                    i,
                    width,
                    stride_qn,
                    stride_qd,
                    stride_n,
                    1,
                    HEAD_DIM,
                    BLOCK_I,
                    BLOCK_J,
                    BLOCK_D,
                    PRECISION,
                )
        announce(counters_ptr)
    else:
        wait_for(counters_ptr, producers)
        reach = tl.load(reach_ptr + 2 * table)
        for line in range(part, width, producers):
            first = tl.cast(line, tl.int64) * stride_n
            for i in range(0, height, BLOCK_I):
                blur_block(
                    halfway_ptr + image + first,
                    blurred_ptr + image + first,
                    row_weights_ptr + table * height * height,
                    reach,
                    i,
                    height,
                    width * stride_n,
                    1,
                    width * stride_n,
                    1,
                    HEAD_DIM,
                    BLOCK_I,
                    BLOCK_J,
                    BLOCK_D,
                    PRECISION,
                )
        announce(counters_ptr + 1)


@dataclass(frozen=True)
class Producers:
    """What a launch with producers needs.

    Attributes:
        image: for the blurred queries, ``[blurred samples, grid tokens, heads, head_dim]``, contiguous.
        halfway: the same in float32, blurred along the width.
        counters: at zero.
        of_head: programs of a head in each phase.
        phase_programs: programs of a phase.
    """

    image: torch.Tensor | None = None
    halfway: torch.Tensor | None = None
    counters: torch.Tensor | None = None
    of_head: int = 0
    phase_programs: int = 0


NO_PRODUCERS = Producers()


def producers_for(query: torch.Tensor, grid: Grid, samples: int) -> Producers:
    """Memory and programs that blur so many samples of a batch."""
    heads = samples * query.shape[1]
    shape = samples, grid.tokens, query.shape[1], query.shape[3]
    of_head = producers_of_head(heads, grid.height, grid.width, multiprocessors(query.device))
    return Producers(
        image=query.new_empty(shape),
        halfway=query.new_empty(shape, dtype=torch.float32),
        counters=counters(query.device, heads),
        of_head=of_head,
        phase_programs=heads * of_head,
    )


def producers_of_head(heads: int, height: int, width: int, parallel: int) -> int:
    """How many programs blur one head: together as many as there are multiprocessors, none without a line.

    Args:
        heads: of all blurred samples.
        height: of the grid.
        width: of the grid.
        parallel: multiprocessors.

    Example:
        >>> producers_of_head(heads=20, height=32, width=32, parallel=132)
        7
    """
    return max(1, min(-(-parallel // heads), height, width))


def counters(device: torch.device, heads: int) -> torch.Tensor:
    """Counters at zero, int32, for ``heads`` blurred samples' heads.

    Launches on one stream follow each other and share them. A CUDA graph may be replayed on any stream, beside
    others, so it gets its own, which it sets to zero itself.
    """
    if device.type != "cuda":
        return torch.zeros(COUNTERS * heads, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(COUNTERS * heads, dtype=torch.int32, device=device)
    return _stream_counters(device, torch.cuda.current_stream(device).cuda_stream, next_power_of_2(heads))


@cache
def _stream_counters(device: torch.device, stream: int, heads: int) -> torch.Tensor:
    with table_making():
        return torch.zeros(COUNTERS * heads, dtype=torch.int32, device=device)
