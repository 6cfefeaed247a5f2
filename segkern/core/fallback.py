# SPDX-License-Identifier: Apache-2.0
"""PyTorch's path in place of kernels that cannot be compiled or launched: one warning, and no second attempt.

Triton compiles a kernel at its first launch, and much of that is the machine's: a C compiler for the launcher, ptxas, a
folder for its cache, a driver that takes the binary. Everything that such a launch raises is a :class:`KernelFailure`,
but for what PyTorch's path would meet as well: no memory left, a device that an earlier kernel has broken.
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
    """A Triton kernel could not be compiled or launched; its cause is what Triton raised."""


Kind = tuple[torch.device, str, torch.dtype, int]  # device, operation, dtype, head_dim

_REASONS: dict[Kind, str] = {}
_WARNED: set[tuple[torch.device, str]] = set()
_LOCK = threading.Lock()

_NOT_THE_KERNELS = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)
# By its text, because Triton raises a RuntimeError with the driver's words for all that the driver refuses.
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
    "captur",  # capturing, captured: a CUDA graph does not allow it now
)


def run_with_fallback(
    operation: str, asked: str, kernels: Callable[..., T], pytorch: Callable[..., T], x: torch.Tensor, *arguments: Any
) -> T:
    """``kernels(x, *arguments)``; should they fail, ``pytorch(x, *arguments)`` for this and all such calls to come.

    Args:
        operation: such as ``"seg_attention"``.
        asked: the backend that the caller asked for.
        kernels: launches the kernels.
        pytorch: computes the same with PyTorch.
        x: the first tensor of the call; its device, dtype and last dimension are what is given up.

    Raises:
        KernelFailure, ImportError: the kernels' error, where ``asked`` is ``"triton"``.
    """
    try:
        return kernels(x, *arguments)
    except (KernelFailure, ImportError) as error:  # a broken Triton is met when kernels are imported
        if asked == "triton":
            raise
        reason = describe_error(error.__cause__ or error)
    with _LOCK:
        _REASONS[x.device, operation, x.dtype, x.shape[-1]] = reason
        warned = (x.device, reason) in _WARNED
        _WARNED.add((x.device, reason))
    if not warned:
        warnings.warn(
            f"segkern's Triton kernels cannot be used for {operation} on {x.device} ({reason}); PyTorch's path serves "
            f"such calls from now on. backend='triton' raises the whole error",
            RuntimeWarning,
            stacklevel=3,
        )
    return pytorch(x, *arguments)


def is_kernel_failure(error: BaseException) -> bool:
    """True if an error that a launch raised is about compiling and launching the kernel.

    Example:
        >>> [is_kernel_failure(RuntimeError(f"Triton Error [CUDA]: {text}")) for text in
        ...  ("device kernel image is invalid", "out of memory", "an illegal memory access was encountered")]
        [True, False, False]
    """
    if not isinstance(error, Exception) or isinstance(error, _NOT_THE_KERNELS):
        return False
    return not (type(error) is RuntimeError and any(text in str(error) for text in _TEXTS_OF_OTHERS))


def describe_error(error: BaseException) -> str:
    """An error in one line.

    Example:
        >>> describe_error(OSError("no file"))
        'OSError: no file'
    """
    text = getattr(error, "error_message", None) or str(error)  # without the source code that Triton puts before it
    if isinstance(error, subprocess.CalledProcessError):  # whose command names files that are new each time
        program = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        text = f"{program} ended with {error.returncode}"
    return textwrap.shorten(f"{type(error).__name__}: {text}", 300)


def failure_reason(device: torch.device, operation: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason for which a kind of call was given up in this process, or None."""
    return _REASONS.get((device, operation, dtype, head_dim)) if _REASONS else None


def failure_count() -> int:
    """The number of kinds of calls that were given up in this process."""
    return len(_REASONS)


def forget_failures() -> None:
    """Try all kernels again, and warn again of those that fail."""
    with _LOCK:
        _REASONS.clear()
        _WARNED.clear()
