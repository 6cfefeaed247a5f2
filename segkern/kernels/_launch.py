# SPDX-License-Identifier: Apache-2.0
"""Kernel launches on the tensors' device with fixed compiler options. Failures raise :class:`KernelFailure`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
import triton

from segkern.core.fallback import KernelFailure, describe_error, is_kernel_failure
from segkern.core.private_apis import triton_allocator
from segkern.kernels._configs import Options, Tile, dot_precision, split_head_dim

_NOTHING = contextlib.nullcontext()


class _Launching:
    """A context that converts an exception into a KernelFailure if it comes from the kernel."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and is_kernel_failure(error):
            raise KernelFailure(
                f"a Triton kernel could not be compiled or launched: {describe_error(error)}"
            ) from error


class _LaunchingElsewhere(torch.cuda.device):
    """The same context for a device that is not the current one."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        super().__exit__(kind, error, trace)
        return _HERE.__exit__(kind, error, trace)


_HERE = _Launching()


def launching(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context for a launch: it makes ``device`` current and distinguishes kernel failures from device errors.

    It costs nothing if the device is already current or is the CPU.

    Raises:
        KernelFailure: On exit, if Triton raised an error about the kernel.
    """
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _HERE
    return _LaunchingElsewhere(device)


_ALIGNED_BYTES = 16  # Triton compiles a separate kernel for pointers that are multiples of it
_MOST_FROZEN = 4096  # maximum number of cached kinds of launches; a run has a few dozen
_FROZEN: dict[Any, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[torch.Tensor, ...],
    tables: tuple[torch.Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: dict[str, Any],
) -> None:
    """Launch ``kernel[(programs,)](*tensors, *tables, *numbers, **constants)`` in a third of Triton's time.

    Triton inspects every argument at every launch to find the compiled kernel. This function does so once for launches
    that agree in the properties Triton inspects: types and alignment of tensors, numbers, constants. Later launches
    call the compiled kernel directly.

    Args:
        kernel: Kernel whose parameters are tensors, tables, numbers and constants, in this order.
        programs: Number of programs.
        tensors: The caller's tensors, all on the current device.
        tables: Tensors made for launches. Their types and alignment follow from the other arguments.
        numbers: The other arguments that are not constants.
        constants: Constants by name, and compiler options.
    """
    dtypes = [x.dtype for x in tensors]
    misaligned = [i for i, x in enumerate(tensors) if x.data_ptr() % _ALIGNED_BYTES]
    key = tensors[0].device, programs, *dtypes, *misaligned, *numbers, *constants.values()
    of, run, values = _FROZEN.get(key, (None, None, ()))
    if of is kernel:
        run(*tensors, *tables, *numbers, *values)
        return
    compiled = kernel[(programs,)](*tensors, *tables, *numbers, **constants)
    if compiled is None:  # in the interpreter
        return
    if len(_FROZEN) >= _MOST_FROZEN:
        _FROZEN.clear()
    values = tuple(constants[name] for name in kernel.arg_names if name in constants)
    _FROZEN[key] = kernel, compiled[(programs, 1, 1)], values


_LARGEST_TILE = 256  # maximum rows, columns or channels that a program addresses from one pointer


@lru_cache(maxsize=1024)
def strides_are_wide(*strides: tuple[int, ...], rows: int = _LARGEST_TILE) -> bool:
    """Return True if offsets inside a tile of four-dimensional tensors may exceed 32 bits, so a kernel needs 64 bits.

    ``rows`` is the number of tokens that a program addresses from the first one, if more than in an ordinary tile.
    """
    return any(max(s[2] * max(rows, _LARGEST_TILE), s[3] * _LARGEST_TILE) >= 2**31 for s in strides)


_DESCRIBED_BYTES = 16  # addresses and strides of a tensor descriptor must be multiples of it


def can_be_described(*tensors: torch.Tensor) -> bool:
    """Return True if kernels can make tensor descriptors of each head: aligned, with contiguous channels."""
    for x in tensors:
        if x.data_ptr() % _DESCRIBED_BYTES or not _strides_can_be_described(x.stride(), x.itemsize):
            return False
    return True


@lru_cache(maxsize=1024)
def _strides_can_be_described(strides: tuple[int, ...], itemsize: int) -> bool:
    *outer, last = strides
    return last == 1 and outer[-1] > 0 and not any(n * itemsize % _DESCRIBED_BYTES for n in outer)


def scratch_memory(wanted: bool) -> AbstractContextManager[Any]:
    """Return a context that gives kernels memory for tensor descriptors and restores the user's Triton allocator."""
    return _allocating() if wanted else _NOTHING


@contextlib.contextmanager
def _allocating() -> Iterator[None]:
    before = triton_allocator()
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    try:
        yield
    finally:
        triton.set_allocator(before)


def next_power_of_2(n: int) -> int:
    """Return the next power of two. Triton's function of this name takes microseconds on the host.

    Example:
        >>> [next_power_of_2(n) for n in (1, 2, 3, 40)]
        [1, 2, 4, 64]
    """
    return 1 << (n - 1).bit_length()


def compile_options(options: Tile | Options, hip: bool | None = None) -> dict[str, Any]:
    """Return the keyword options of a launch. Fused multiply-adds are explicit because Triton's default varies."""
    hip = torch.version.hip is not None if hip is None else hip
    keywords = {"num_warps": options.num_warps, "num_stages": options.num_stages, "enable_fp_fusion": True}
    return keywords if options.max_registers is None or hip else keywords | {"maxnreg": options.max_registers}


@lru_cache(maxsize=256)
def tile_constants(tile: Tile, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants and options of a kernel launch that follow from its tile."""
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
