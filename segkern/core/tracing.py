# SPDX-License-Identifier: Apache-2.0
"""Tracers, transforms, derivatives and autocast around a call, and what they require of it."""

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
    """True while ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` records a call, to run it later."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_plain(*tensors: torch.Tensor) -> bool:
    """True if these are real, dense tensors in an eager run, none that a tracer follows.

    Only then may tables be made here, and a backend be chosen; operators do both when they run.
    """
    return not is_traced() and all(
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_nested for x in tensors
    )


def fixed_numbers(value: Any) -> Any:
    """The value with its numbers as constants of the graph that is compiled, which other numbers compile anew.

    A number that stays a symbol of the graph cannot be asked what it is, and Inductor of torch 2.13 takes an old value
    of it where it also multiplies a tensor (pytorch/pytorch#197889).
    """
    if not torch.compiler.is_compiling():
        return value
    if isinstance(value, (list, tuple)):
        return tuple([fixed_numbers(entry) for entry in value])
    return specialised_number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def fixed_sigmas(sigma: Any) -> Any:
    """:func:`fixed_numbers`, or a tensor of what can only be read when the graph runs: tensors and NumPy's numbers."""
    if is_traced() and not isinstance(sigma, (int, float)):  # a symbol of a graph can be asked nothing else
        if isinstance(sigma, (list, tuple)) and any(isinstance(entry, torch.Tensor) for entry in sigma):
            return torch.stack([torch.as_tensor(entry, dtype=torch.float64) for entry in sigma])
        if hasattr(sigma, "__array__"):
            return torch.as_tensor(sigma)
    return fixed_numbers(sigma)


def check_not_jit_traced(call: str) -> None:
    """Raise a ValueError for a call that ``torch.jit.trace`` would record for the present sizes alone."""
    if torch.jit.is_tracing():
        raise ValueError(
            f"torch.jit.trace cannot record {call}: it would keep the present sizes, and be wrong for others; take "
            f"torch.export or torch.compile"
        )


@constant_while_compiling
def _is_transformed_while_compiling() -> bool:
    return transform_is_active() or forward_mode_is_active()


def can_skip_operator(*tensors: torch.Tensor | None) -> bool:
    """True if nothing follows a call (no gradient, transform or mode), so that its function may be called directly.

    Tensors without data are seen: the operator tells shapes of results, where its function would go through blocks.
    """
    if any(x is not None and x.is_meta for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    return not dispatch_mode_is_active() and not transform_is_active()


def is_transformed() -> bool:
    """True if an eager call needs PyTorch's own operations: under ``torch.func`` or forward-mode derivatives."""
    return not torch.compiler.is_compiling() and (transform_is_active() or forward_mode_is_active())


def own_result(x: torch.Tensor) -> torch.Tensor:
    """The same memory in a tensor that may be changed in place where gradients are on.

    Autograd does not allow that for a view that was made where they were off.
    """
    return x if torch.is_grad_enabled() or is_traced() or is_transformed() else x.detach()


def differentiable_backend(backend: str, *tensors: torch.Tensor) -> str:
    """The backend, or PyTorch's path where operators have no rules: forward-mode derivatives, ``torch.func``.

    Raises:
        ValueError: for ``"triton"`` there, and inside ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        if _is_transformed_while_compiling():
            raise ValueError(
                "segkern's functions take no part in torch.func's transforms and forward-mode derivatives inside "
                "torch.compile; take the transform of the function that is not compiled"
            )
        return backend
    if not (transform_is_active() or forward_mode_is_active()):
        return backend
    if backend == "triton":
        if _has_tangent(*tensors):
            raise ValueError("backend='triton' has no forward-mode derivatives; take backend='torch'")
        if transform_is_active():
            raise ValueError("backend='triton' takes no part in torch.func's transforms; take backend='torch'")
        return backend
    return "torch"


def check_no_forward_mode() -> None:
    """Raise a RuntimeError inside a ``dual_level``, whose derivatives operators drop; for graphs compiled before it."""
    if forward_mode_is_active():
        raise RuntimeError(
            "segkern's operators have no forward-mode derivatives, and a torch.autograd.forward_ad.dual_level is open; "
            "call segkern's functions outside of torch.compile there, with backend='auto' or 'torch'"
        )


def _has_tangent(*tensors: torch.Tensor) -> bool:
    return forward_mode_is_active() and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def autocast_inputs(check: Callable[[str, Any], None], **tensors: Any) -> tuple[Any, ...]:
    """The arguments as autocast casts those of PyTorch's attention, by name; each is checked before it is cast."""
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
    """True if PyTorch knows autocast for a kind of device. The compiler of torch 2.11 cannot trace that question."""
    if torch.compiler.is_compiling():
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)
