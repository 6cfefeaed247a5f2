# SPDX-License-Identifier: Apache-2.0
"""What every launch does the same way: the right device, fixed compiler options, no autotuning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
import triton

from segkern.kernels._configs import Options, Tile, dot_precision, split_head_dim

_NOTHING = contextlib.nullcontext()


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current one for a launch; costs nothing when it is already, or is the CPU."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NOTHING
    return torch.cuda.device(device)


_LARGEST_TILE = 256  # rows, columns or channels that a program addresses from one pointer


def strides_are_wide(*strides: tuple[int, ...]) -> bool:
    """Whether offsets inside a tile of four-dimensional tensors may exceed 32 bits, so that a kernel needs 64."""
    return any(max(stride[2], stride[3]) * _LARGEST_TILE >= 2**31 for stride in strides)


_DESCRIBED_BYTES = 16  # what addresses and strides of a tensor descriptor are multiples of


def can_be_described(*tensors: torch.Tensor) -> bool:
    """Whether kernels can make tensor descriptors of each head: aligned, and channels next to each other."""
    for x in tensors:
        *outer, last = x.stride()
        if last != 1 or outer[-1] <= 0 or any(n * x.itemsize % _DESCRIBED_BYTES for n in outer):
            return False
        if x.data_ptr() % _DESCRIBED_BYTES:
            return False
    return True


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def scratch_memory(wanted: bool) -> AbstractContextManager[Any]:
    """Let kernels that make tensor descriptors have memory for them; what the user has set for Triton comes back."""
    return _allocating() if wanted else _NOTHING


@contextlib.contextmanager
def _allocating() -> Iterator[None]:
    from triton.runtime._allocation import _allocator

    before = _allocator.get()
    triton.set_allocator(_scratch)
    try:
        yield
    finally:
        triton.set_allocator(before)


def next_power_of_2(n: int) -> int:
    """Triton's function of that name is for both sides of a launch and takes microseconds on the host.

    Example:
        >>> [next_power_of_2(n) for n in (1, 2, 3, 40)]
        [1, 2, 4, 64]
    """
    return 1 << (n - 1).bit_length()


def compile_options(options: Tile | Options, hip: bool | None = None) -> dict[str, Any]:
    """Keyword options of a launch; fused multiply-adds are asked for by name because Triton's default varies."""
    hip = torch.version.hip is not None if hip is None else hip
    found = {"num_warps": options.num_warps, "num_stages": options.num_stages, "enable_fp_fusion": True}
    return found if options.max_registers is None or hip else found | {"maxnreg": options.max_registers}


@lru_cache(maxsize=256)
def tile_constants(tile: Tile, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a tile settles for the compiler."""
    block_d, block_r = split_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "PRECISION": dot_precision(dtype),
        **compile_options(tile),
    }
