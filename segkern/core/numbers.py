# SPDX-License-Identifier: Apache-2.0
"""Conversion of number arguments: Python numbers, NumPy numbers, and one-element tensors or arrays."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
from torch.autograd import forward_ad


def real_number(value: Any) -> float | None:
    """Return the value as a float, or None unless it is one real number.

    Example:
        >>> real_number(2), real_number(torch.tensor([0.5])), real_number([0.5]), real_number(True)
        (2.0, 0.5, None, None)
    """
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt, Real)):  # Real covers NumPy numbers
        try:
            return None if isinstance(value, bool) else float(value)
        except OverflowError:  # an integer or a fraction beyond float64
            return None
    if isinstance(value, torch.Tensor):
        return float(value.detach()) if value.numel() == 1 and holds_real_numbers(value) else None
    # An array, except NumPy's masked number.
    if getattr(value, "size", None) == 1 and hasattr(value, "item") and not hasattr(value, "mask"):
        return real_number(value.item())
    return None


def whole_number(value: Any) -> int | None:
    """Return the value as an integer, or None unless it is one.

    ``torch.jit.trace`` represents sizes as tensors and cannot trace them through an integer, so the result for such
    sizes is None.

    Example:
        >>> whole_number(3), whole_number(torch.tensor(3)), whole_number(3.0), whole_number(torch.tensor(True))
        (3, 3, None, None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, torch.SymInt)):  # a symbol stays a symbol while compiling
        return value  # type: ignore[return-value]
    if isinstance(value, torch.Tensor) and (torch.jit.is_tracing() or not _is_integral(value)):
        return None
    if "bool" in type(value).__name__:  # NumPy's bool, which has an index in some versions
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def holds_real_numbers(x: torch.Tensor) -> bool:
    """Return True for a dense tensor of real numbers of any dtype except bool, not on the meta device."""
    readable = x.layout == torch.strided and not (x.is_nested or x.is_quantized or x.is_meta)
    return readable and not (x.is_complex() or x.dtype == torch.bool)


def check_no_gradient(name: str, value: object, instead: str) -> None:
    """Raise a ValueError if the value is a tensor that requires a derivative, which is not computed.

    Args:
        name: Name of the argument.
        value: Any value. Only tensors can require a derivative.
        instead: What to do instead, for the message.
    """
    if not isinstance(value, torch.Tensor):
        return
    wanted = torch.is_grad_enabled() and value.requires_grad
    if not wanted and not torch.compiler.is_compiling():
        wanted = forward_ad.unpack_dual(value).tangent is not None
    if wanted:
        raise ValueError(f"{name} has no derivative, and {name}={value} requires one; {instead}")


def _is_integral(x: torch.Tensor) -> bool:
    return holds_real_numbers(x) and not x.is_floating_point()
