# SPDX-License-Identifier: Apache-2.0
"""What becomes of kernels that cannot be compiled or launched: told once, remembered, and not tried again.

Triton compiles a kernel at its first launch, and much of that is the machine's: a C compiler for the launcher, ptxas, a
folder for its cache, a driver that takes the binary. Everything that such a launch raises is a :class:`KernelFailure`,
but for what PyTorch's path would meet as well: no memory left, a device that an earlier kernel has broken.
"""

from __future__ import annotations

import subprocess
import textwrap
import threading
import warnings

import torch


class KernelFailure(RuntimeError):
    """A Triton kernel could not be compiled or launched; its cause is what Triton raised."""


# A broken Triton is met when kernels are imported, at their first launch.
FAILURES = (KernelFailure, ImportError)

Kind = tuple[torch.device, str, torch.dtype, int]  # device, operation, dtype, head_dim

_FAILED: dict[Kind, str] = {}
_TOLD: set[tuple[torch.device, str]] = set()
_TELLING = threading.Lock()

_NOT_THE_KERNELS = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)
# In words, because Triton raises a RuntimeError with the driver's words for all that the driver refuses.
_WORDS_OF_OTHERS = (
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


def is_the_kernels(error: BaseException) -> bool:
    """Whether what a launch raised is about compiling and launching the kernel.

    Example:
        >>> [is_the_kernels(RuntimeError(f"Triton Error [CUDA]: {words}")) for words in
        ...  ("device kernel image is invalid", "out of memory", "an illegal memory access was encountered")]
        [True, False, False]
    """
    if not isinstance(error, Exception) or isinstance(error, _NOT_THE_KERNELS):
        return False
    return not (type(error) is RuntimeError and any(words in str(error) for words in _WORDS_OF_OTHERS))


def in_words(error: BaseException) -> str:
    """An error in one line.

    Example:
        >>> in_words(OSError("no file"))
        'OSError: no file'
    """
    text = getattr(error, "error_message", None) or str(error)  # without the source code that Triton puts before it
    if isinstance(error, subprocess.CalledProcessError):  # whose command names files that are new each time
        program = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        text = f"{program} ended with {error.returncode}"
    return textwrap.shorten(f"{type(error).__name__}: {text}", 300)


def why_failed(device: torch.device, operation: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a kind of call was given up in this process, or None."""
    return _FAILED.get((device, operation, dtype, head_dim)) if _FAILED else None


def give_up(error: Exception, asked: str, operation: str, x: torch.Tensor) -> None:
    """Leave a kind of call to PyTorch's path for good, with one warning for each reason of a device.

    Args:
        error: one of ``FAILURES``.
        asked: the backend that the caller asked for.
        operation: such as ``"seg_attention"``.
        x: the first tensor of the call; its device, dtype and last dimension are what is given up.

    Raises:
        RuntimeError, ImportError: the error itself, where ``asked`` is ``"triton"``.
    """
    if asked == "triton":
        raise error
    reason = in_words(error.__cause__ or error)
    with _TELLING:
        _FAILED[x.device, operation, x.dtype, x.shape[-1]] = reason
        told = (x.device, reason) in _TOLD
        _TOLD.add((x.device, reason))
    if not told:
        warnings.warn(
            f"segkern's Triton kernels cannot be used for {operation} on {x.device} ({reason}); PyTorch's path serves "
            f"such calls from now on. backend='triton' raises the whole error",
            RuntimeWarning,
            stacklevel=3,
        )


def forget() -> None:
    """Try all kernels again, and tell again of those that fail."""
    with _TELLING:
        _FAILED.clear()
        _TOLD.clear()
