# SPDX-License-Identifier: Apache-2.0
"""Tracers, transforms, derivatives and autocast around a call, and what they require of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from segkern.core.private_apis import dispatch_mode_is_active, forward_mode_is_active, transform_is_active


def is_plain(*tensors: torch.Tensor) -> bool:
    """True if these are real tensors in an eager run, none that a tracer follows.

    Only then may tables be made here, and a backend be chosen; operators do both when they run.
    """
    if torch.compiler.is_compiling():
        return False
    return all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)


def can_skip_operator(*tensors: torch.Tensor | None) -> bool:
    """True if nothing follows a call (no gradient, transform or mode), so that its function may be called directly.

    Tensors without data are seen: the operator tells shapes of results, where its function would go through blocks.
    """
    if any(x is not None and x.is_meta for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    return not dispatch_mode_is_active() and not transform_is_active()


def is_transformed(*tensors: torch.Tensor) -> bool:
    """True if only PyTorch's own operations will do: under ``torch.func`` or with forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return False
    return transform_is_active() or _has_tangent(*tensors)


def differentiable_backend(backend: str, *tensors: torch.Tensor) -> str:
    """The backend, or PyTorch's path where operators have no rules: forward-mode derivatives, ``torch.func``.

    Raises:
        ValueError: for ``"triton"`` there.
    """
    if not is_transformed(*tensors):
        return backend
    if backend == "triton":
        if _has_tangent(*tensors):
            raise ValueError("backend='triton' has no forward-mode derivatives; take backend='torch'")
        raise ValueError("backend='triton' takes no part in torch.func's transforms; take backend='torch'")
    return "torch"


def _has_tangent(*tensors: torch.Tensor) -> bool:
    return forward_mode_is_active() and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def autocast_inputs(check: Callable[..., None], *tensors: Any) -> tuple[Any, ...]:
    """The arguments as autocast casts those of PyTorch's attention; they are checked before they are cast."""
    if not isinstance(tensors[0], torch.Tensor):
        return tensors
    device_type = tensors[0].device.type
    if not has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    check(*tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def has_autocast(device_type: str) -> bool:
    """True if PyTorch knows autocast for a kind of device. The compiler of torch 2.11 cannot trace that question."""
    if torch.compiler.is_compiling():
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)
