# SPDX-License-Identifier: Apache-2.0
"""Checks for tracers, transforms, derivatives and autocast around a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from segkern.core.private_apis import (
    constant_while_compiling,
    dispatch_mode_is_active,
    forward_mode_is_active,
    specialised_number,
    transform_is_active,
)


def is_traced() -> bool:
    """Return True while ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` records a call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_plain(*tensors: torch.Tensor) -> bool:
    """Return True if these are real, dense tensors in eager mode, and no tracer records the call.

    If so, the caller may make tables and choose a backend immediately. Otherwise, the operators do so when they run.
    """
    return not is_traced() and all(
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_nested for x in tensors
    )


def fixed_numbers(value: Any) -> Any:
    """Return the value with its numbers as constants of the compiled graph. New numbers recompile the graph.

    Code cannot branch on a number that stays a symbol of the graph. Inductor of torch 2.13 also uses an old value of
    the symbol where it multiplies a tensor (pytorch/pytorch#197889).
    """
    if not torch.compiler.is_compiling():
        return value
    if isinstance(value, (list, tuple)):
        return tuple([fixed_numbers(entry) for entry in value])
    return specialised_number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def fixed_sigmas(sigma: Any) -> Any:
    """Apply :func:`fixed_numbers`, or return a tensor for values that are known only when the graph runs."""
    if is_traced() and not isinstance(sigma, (int, float)):  # a graph's symbolic numbers support no other check
        if isinstance(sigma, (list, tuple)) and any(isinstance(entry, torch.Tensor) for entry in sigma):
            return torch.stack([torch.as_tensor(entry, dtype=torch.float64) for entry in sigma])
        if hasattr(sigma, "__array__"):
            return torch.as_tensor(sigma)
    return fixed_numbers(sigma)


def check_not_jit_traced(call: str) -> None:
    """Raise a ValueError for a call that ``torch.jit.trace`` would record for the present sizes only."""
    if torch.jit.is_tracing():
        raise ValueError(
            f"torch.jit.trace cannot record {call}: the trace would be valid for the present sizes only and wrong for "
            f"others; use torch.export or torch.compile"
        )


@constant_while_compiling
def _is_transformed_while_compiling() -> bool:
    return transform_is_active() or forward_mode_is_active()


def can_skip_operator(*tensors: torch.Tensor | None) -> bool:
    """Return True if no gradient, transform or mode is active, so the operator's function may be called directly.

    Tensors without data are excluded: the operator's fake returns shapes, but the function would compute blocks.
    """
    if any(x is not None and x.is_meta for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    return not dispatch_mode_is_active() and not transform_is_active()


def is_transformed() -> bool:
    """Return True if an eager call needs PyTorch operations: under ``torch.func`` or forward-mode derivatives."""
    return not torch.compiler.is_compiling() and (transform_is_active() or forward_mode_is_active())


def own_result(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the same memory that may be changed in place where gradients are enabled.

    Autograd does not allow in-place changes of a view that was made while gradients were disabled.
    """
    return x if torch.is_grad_enabled() or is_traced() or is_transformed() else x.detach()


def differentiable_backend(backend: str, *tensors: torch.Tensor) -> str:
    """Return the backend, or ``"torch"`` where operators have no rules: forward-mode derivatives, ``torch.func``.

    Raises:
        ValueError: If a derivative of these kinds is needed with the backend ``"triton"`` or inside ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        if _is_transformed_while_compiling():
            raise ValueError(
                "segkern's functions do not support torch.func transforms or forward-mode derivatives inside "
                "torch.compile; transform the function outside torch.compile"
            )
        return backend
    if not (transform_is_active() or forward_mode_is_active()):
        return backend
    if backend == "triton":
        if _has_tangent(*tensors):
            raise ValueError("backend='triton' does not support forward-mode derivatives; use backend='torch'")
        if transform_is_active():
            raise ValueError("backend='triton' does not support torch.func transforms; use backend='torch'")
        return backend
    return "torch"


def check_no_forward_mode() -> None:
    """Raise a RuntimeError if a graph compiled earlier runs in a ``dual_level``, where operators drop derivatives."""
    if forward_mode_is_active():
        raise RuntimeError(
            "segkern's operators do not support forward-mode derivatives, and a torch.autograd.forward_ad.dual_level "
            "is open; call segkern's functions outside torch.compile there, with backend='auto' or 'torch'"
        )


def _has_tangent(*tensors: torch.Tensor) -> bool:
    return forward_mode_is_active() and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def autocast_inputs(check: Callable[[str, Any], None], **tensors: Any) -> tuple[Any, ...]:
    """Return the arguments by name, cast as autocast casts PyTorch's attention. Each is checked before the cast."""
    first = next(iter(tensors.values()))
    if not isinstance(first, torch.Tensor):
        return tuple(tensors.values())
    device_type = first.device.type
    if not has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return tuple(tensors.values())
    for name, x in tensors.items():
        check(name, x)
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors.values())


def has_autocast(device_type: str) -> bool:
    """Return True if autocast supports this device type. The compiler of torch 2.11 cannot trace this check."""
    if torch.compiler.is_compiling():
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)
