# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend; the predicate that refuses one is the one that explains."""

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
    """True if ``import triton`` would find a package; it is not imported."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def why_triton_is_broken() -> str | None:
    """The error that ``import triton`` raises; None where it works."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # of a package of many parts, and native ones
        return describe_error(error)
    return None


def interpreting() -> bool:
    """True if Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before their first use)."""
    if not triton_is_installed() or why_triton_is_broken() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=64)
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int | None = None) -> str | None:
    """The reason why the Triton kernels cannot serve such a call; None when they can.

    Example:
        >>> why_not_triton(torch.device("cuda"), torch.float64, 64)
        'the Triton kernels take float16, bfloat16 and float32, not float64'
    """
    if dtype not in _TRITON_DTYPES:
        return f"the Triton kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"the Triton kernels take head dimensions from 1 to {MAX_HEAD_DIM}, not {head_dim}"
    if value_dim not in (None, head_dim):
        return f"the Triton kernels need values as wide as queries, not head_dim {head_dim} and value_dim {value_dim}"
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
    """Raise a ValueError that quotes an unknown backend."""
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
    """The backend that serves a call and the reason: ``("triton" | "torch", reason)``.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        head_dim: of queries and keys.
        backend: what the caller asked for.
        value_dim: of values, if it may differ.
        blurs: whether any sample has a sigma other than 0, or its rows are those of one at fewer points.
        operation: whose kernels serve it; where they failed in this process, ``"auto"`` does not try them again.

    Raises:
        ValueError: when ``backend`` is unknown, or is ``"triton"`` and cannot serve the call; the message says why.

    Example:
        >>> choose_backend(torch.device("cpu"), torch.float64, 64)[0]
        'torch'
    """
    check_backend(backend)
    if backend == "torch":
        return "torch", "asked for"
    reason = why_not_triton(device, dtype, head_dim, value_dim)
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"backend='triton' cannot serve this call: {reason}")
        return "triton", "asked for"
    if reason is not None:
        return "torch", reason
    if not blurs:
        return "torch", "nothing to blur: PyTorch's own attention"
    if device.type == "cpu":
        return "torch", "Triton's interpreter is for tests"
    if dtype == torch.float32:
        return "torch", "float32 products at full precision gain nothing from the fused kernels"
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
    """The backend that serves ``seg_attention``; see :func:`choose_backend`.

    ``wide_mask`` is for an additive mask in a wider dtype than the queries', which PyTorch's attention on a GPU lacks.
    """
    # Few rows have a kernel of their own.
    fused = any(sigmas) or query.shape[2] < key.shape[2] or wide_mask
    return choose_backend(query.device, query.dtype, query.shape[3], backend, value.shape[3], fused)[0]
