# SPDX-License-Identifier: Apache-2.0
"""Choice of the backend. The function that rejects a backend also returns the reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache

import torch

from segkern.core.fallback import describe_error, failure_reason

BACKENDS = ("auto", "triton", "torch")

MAX_HEAD_DIM = 256

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@lru_cache(maxsize=1)
def triton_is_installed() -> bool:
    """Return True if ``import triton`` would find a package, without importing it."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def why_triton_is_broken() -> str | None:
    """Return the error that ``import triton`` raises, or None if it succeeds."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a package with native parts can raise anything
        return describe_error(error)
    return None


def interpreting() -> bool:
    """Return True if Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before their first use)."""
    if not triton_is_installed() or why_triton_is_broken() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=64)
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int | None = None) -> str | None:
    """Return the reason why the Triton kernels cannot serve a call, or None if they can.

    Example:
        >>> why_not_triton(torch.device("cuda"), torch.float64, 64)
        'the Triton kernels support float16, bfloat16 and float32, not float64'
    """
    if dtype not in _TRITON_DTYPES:
        return f"the Triton kernels support float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"the Triton kernels support head dimensions from 1 to {MAX_HEAD_DIM}, not {head_dim}"
    if value_dim not in (None, head_dim):
        return f"the Triton kernels need value_dim equal to head_dim, not head_dim {head_dim} and value_dim {value_dim}"
    if not triton_is_installed():
        return "the package triton is not installed (pip install triton)"
    if device.type == "cpu":
        if why_triton_is_broken() is not None:
            return f"the package triton cannot be imported: {why_triton_is_broken()}"
        if not interpreting():
            return "Triton has no CPU target (set TRITON_INTERPRET=1 to run kernels in its slow interpreter)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes wrong bfloat16 products"
        return None
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA and ROCm devices, not on {device.type!r}"
    if torch.version.hip is None and _compute_capability(device) < (8, 0):
        major, minor = _compute_capability(device)
        return f"the Triton kernels need compute capability 8.0, and {device} has {major}.{minor}"
    return None


def check_backend(backend: str) -> None:
    """Raise a ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    backend: str = "auto",
    value_dim: int | None = None,
    blurs: bool = True,
    operation: str = "seg_attention",
) -> tuple[str, str]:
    """Return the backend that serves a call, and the reason: ``("triton" | "torch", reason)``.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        head_dim: Head dimension of queries and keys.
        backend: The backend that the caller requested.
        value_dim: Head dimension of the values, if it may differ.
        blurs: Whether any sample has a sigma other than 0, or is computed at the points of a coarse grid.
        operation: The operation. If its kernels failed in this process, ``"auto"`` does not try them again.

    Raises:
        ValueError: If ``backend`` is unknown, or is ``"triton"`` and cannot serve the call. The message gives the
            reason.

    Example:
        >>> choose_backend(torch.device("cpu"), torch.float64, 64)[0]
        'torch'
    """
    check_backend(backend)
    if backend == "torch":
        return "torch", "requested"
    reason = why_not_triton(device, dtype, head_dim, value_dim)
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"backend='triton' cannot serve this call: {reason}")
        return "triton", "requested"
    if reason is not None:
        return "torch", reason
    if not blurs:
        return "torch", "no blur: PyTorch's own attention"
    if device.type == "cpu":
        return "torch", "Triton's interpreter is only for tests"
    if dtype == torch.float32:
        return "torch", "fused kernels are not faster for float32 products at full precision"
    failure = failure_reason(device, operation, dtype, head_dim)
    if failure is not None:
        return "torch", f"the kernels failed: {failure}"
    return "triton", "fused kernels"


def choose_attention_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sigmas: Sequence[float],
    backend: str,
    wide_mask: bool = False,
) -> str:
    """Return the backend that serves ``seg_attention``; see :func:`choose_backend`.

    ``wide_mask`` marks an additive mask in a wider dtype than the queries. PyTorch's attention on a GPU does not
    support such masks.
    """
    # A separate kernel serves calls with few rows.
    fused = any(sigmas) or query.shape[2] < key.shape[2] or wide_mask
    return choose_backend(query.device, query.dtype, query.shape[3], backend, value.shape[3], fused)[0]
