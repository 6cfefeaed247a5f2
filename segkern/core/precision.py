# SPDX-License-Identifier: Apache-2.0
"""The precision of blurs, logits and masses, independent of autocast and of PyTorch's float32 matmul settings."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from segkern.core.private_apis import constant_while_compiling
from segkern.core.tracing import has_autocast


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, otherwise float32: the dtype of masses, energies and the sums of the blur."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which matrix products are accurate to float32: float64 where PyTorch would round float32.

    ``torch.set_float32_matmul_precision("medium")`` rounds the factors of a product to bfloat16 on some CPUs, and
    ``"high"`` to TF32 on a GPU.
    """
    if x.dtype == torch.float64 or _rounds_float32_products(x.device.type):
        return torch.float64
    return torch.float32


@constant_while_compiling
def _rounds_float32_products(device_type: str) -> bool:
    if device_type == "cuda":
        setting = torch.backends.cuda.matmul.fp32_precision
    elif device_type in ("cpu", "xpu"):
        setting = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    else:
        return False
    return setting not in ("ieee", "none")


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that disables autocast, so blur weights and logits keep their dtype."""
    if not has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)
