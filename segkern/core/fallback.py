# SPDX-License-Identifier: Apache-2.0
"""The PyTorch fallback for kernels that fail to compile or launch: one warning, and no second attempt.

Triton compiles a kernel at its first launch. That depends on the machine: a C compiler for the launcher, ptxas, a
cache folder, a driver that accepts the binary. Every error of such a launch is a :class:`KernelFailure`, except errors
that PyTorch's path would raise as well: out of memory, or a device that an earlier kernel has broken.
"""

from __future__ import annotations

import subprocess
import textwrap
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class KernelFailure(RuntimeError):
    """A Triton kernel failed to compile or launch. The cause is Triton's exception."""


Kind = tuple[torch.device, str, torch.dtype, int]  # device, operation, dtype, head_dim

_REASONS: dict[Kind, str] = {}
_WARNED: set[tuple[torch.device, str]] = set()
_LOCK = threading.Lock()

_NOT_THE_KERNELS = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)
# Recognised by their text, because Triton raises a RuntimeError with the driver's message for every driver error.
_TEXTS_OF_OTHERS = (
    "out of memory",
    "an illegal",
    "unspecified launch failure",
    "misaligned address",
    "device-side assert",
    "launch timed out",
    "uncorrectable",
    "invalid program counter",
    "hardware stack error",
    "address space",
    "context is destroyed",
    "unknown error",
    "captur",  # capturing, captured: not allowed while a CUDA graph is captured
)


def run_with_fallback(
    operation: str, asked: str, kernels: Callable[..., T], pytorch: Callable[..., T], x: torch.Tensor, *arguments: Any
) -> T:
    """Return ``kernels(x, *arguments)``. If that fails, use ``pytorch(x, *arguments)`` for this and all such calls.

    Args:
        operation: Name of the operation, such as ``"seg_attention"``.
        asked: The backend that the caller requested.
        kernels: Function that launches the kernels.
        pytorch: Function that computes the same result with PyTorch.
        x: First tensor of the call. The fallback applies to its device, dtype and last dimension.

    Raises:
        KernelFailure, ImportError: If the kernels fail and ``asked`` is ``"triton"``.
    """
    try:
        return kernels(x, *arguments)
    except (KernelFailure, ImportError) as error:  # ImportError: a broken Triton fails when kernels are imported
        if asked == "triton":
            raise
        reason = describe_error(error.__cause__ or error)
    with _LOCK:
        _REASONS[x.device, operation, x.dtype, x.shape[-1]] = reason
        warned = (x.device, reason) in _WARNED
        _WARNED.add((x.device, reason))
    if not warned:
        warnings.warn(
            f"segkern's Triton kernels cannot be used for {operation} on {x.device} ({reason}); using PyTorch for such "
            f"calls from now on. Pass backend='triton' to see the full error",
            RuntimeWarning,
            stacklevel=3,
        )
    return pytorch(x, *arguments)


def is_kernel_failure(error: BaseException) -> bool:
    """Return True if the error of a launch is about compiling or launching the kernel.

    Example:
        >>> [is_kernel_failure(RuntimeError(f"Triton Error [CUDA]: {text}")) for text in
        ...  ("device kernel image is invalid", "out of memory", "an illegal memory access was encountered")]
        [True, False, False]
    """
    if not isinstance(error, Exception) or isinstance(error, _NOT_THE_KERNELS):
        return False
    return not (type(error) is RuntimeError and any(text in str(error) for text in _TEXTS_OF_OTHERS))


def describe_error(error: BaseException) -> str:
    """Return an error in one line.

    Example:
        >>> describe_error(OSError("no file"))
        'OSError: no file'
    """
    text = getattr(error, "error_message", None) or str(error)  # without Triton's source code excerpt
    if isinstance(error, subprocess.CalledProcessError):  # its command contains temporary file names
        program = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        text = f"{program} ended with {error.returncode}"
    return textwrap.shorten(f"{type(error).__name__}: {text}", 300)


def failure_reason(device: torch.device, operation: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return the reason why this process gave up a kind of call, or None."""
    return _REASONS.get((device, operation, dtype, head_dim)) if _REASONS else None


def failure_count() -> int:
    """Return how many kinds of calls this process gave up."""
    return len(_REASONS)


def forget_failures() -> None:
    """Try all kernels again, and warn again about those that fail."""
    with _LOCK:
        _REASONS.clear()
        _WARNED.clear()
