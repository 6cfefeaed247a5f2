# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public functions. Every message quotes the bad value."""

from __future__ import annotations

import math
from typing import Any

import torch

from segkern.core.numbers import check_no_gradient, real_number
from segkern.core.precision import compute_dtype
from segkern.core.tracing import is_traced
from segkern.grid import Grid


def check_tensor(name: str, x: torch.Tensor) -> None:
    """Raise a ValueError unless ``x`` is a floating-point tensor ``[batch, heads, tokens, dim]``."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a tensor [batch, heads, tokens, dim], got {type(x).__name__}")
    check_layout(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions [batch, heads, tokens, dim], got shape {tuple(x.shape)}")
    if x.shape[3] == 0:
        raise ValueError(f"{name} must have at least one channel, got shape {tuple(x.shape)}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be floating point (float16, bfloat16, float32 or float64), got {x.dtype}")


def check_layout(name: str, x: torch.Tensor) -> None:
    """Raise a ValueError for nested tensors, sparse tensors and other tensors without strides."""
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a dense tensor, got a {kind} one; pad it or convert it with to_dense()")


def check_scale(scale: Any) -> float | None:
    """Return the scale as a float, or None for ``1 / sqrt(head_dim)``. Raise a ValueError unless it is finite."""
    if scale is None:
        return None
    instead = "multiply the queries by it and pass scale=1"
    check_no_gradient("scale", scale, instead)
    if isinstance(scale, torch.Tensor) and is_traced():
        raise ValueError(f"scale must be a number while a call is compiled or traced, got a tensor; {instead}")
    number = real_number(scale)
    # Larger numbers are infinite in float32. The negated comparison also catches NaN.
    if number is None or not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return number


def scale_of(scale: float | None, query: torch.Tensor) -> float:
    """Return the scale, or ``1 / sqrt(head_dim)`` for None."""
    return 1.0 / math.sqrt(query.shape[3]) if scale is None else scale


def check_grid(grid: Grid, tokens: int, *, video: bool = False) -> Grid:
    """Return the grid. Raise a ValueError if it does not fit ``tokens``, or has several frames without ``video``."""
    if not isinstance(grid, Grid):
        raise ValueError(f"grid must be a segkern.Grid(height, width, start=0), got {grid!r}")
    if grid.frames != 1 and not video:
        raise ValueError(f"grid must have one frame here, got {grid}; call the function for each frame's tokens")
    grid.check(tokens)
    return grid


def check_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise a ValueError unless query, key and value are compatible."""
    _check_alike("query, key and value", query=query, key=key, value=value)
    if key.shape[3] != query.shape[3] or value.shape[2] != key.shape[2]:
        raise ValueError(
            f"key must be [batch, heads, keys, head_dim of query] and value [batch, heads, keys, value_dim], got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )


def check_qk(query: torch.Tensor, key: torch.Tensor) -> None:
    """Raise a ValueError unless query and key are compatible."""
    _check_alike("query and key", query=query, key=key)
    if key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key must be [batch, heads, keys, head_dim of query], got query {tuple(query.shape)}, "
            f"key {tuple(key.shape)}"
        )


def _check_alike(names: str, **tensors: torch.Tensor) -> None:
    """Raise a ValueError unless the tensors share dtype, device, batch and heads, and there is at least one key."""
    query = tensors["query"]
    for name, x in tensors.items():
        check_tensor(name, x)
        if x.dtype != query.dtype:
            raise ValueError(f"{names} must share a dtype, got {query.dtype} and {name} in {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{names} must share a device, got {query.device} and {name} on {x.device}")
        if x.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{names} must share batch and heads, got query {tuple(query.shape)} and {name} {tuple(x.shape)}"
            )
    if tensors["key"].shape[2] == 0:
        raise ValueError(f"attention needs at least one key, got key {tuple(tensors['key'].shape)}")


def check_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return the mask with 4 dimensions, each full or 1: boolean, in the query's dtype, or at least float32."""
    if mask is None:
        return None
    full = (*query.shape[:3], key.shape[2])
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"attn_mask must be a tensor, got {type(mask).__name__}")
    check_layout("attn_mask", mask)
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device {query.device}, got {mask.device}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"attn_mask must be boolean or floating point, got {mask.dtype}")
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    # "size in (1, want)" does not work for symbolic sizes of a graph.
    if len(shape) != 4 or any(size != 1 and size != want for size, want in zip(shape, full, strict=True)):
        raise ValueError(f"attn_mask must be broadcastable to [batch, heads, tokens, keys] = {full}, got {shape}")
    mask = mask.reshape(shape)
    if mask.dtype == torch.bool or mask.dtype == query.dtype:
        return mask
    # Rounding to half precision would make large numbers infinite and close ones equal.
    return mask.to(compute_dtype(query.dtype))


def is_wide(mask: torch.Tensor | None, query: torch.Tensor) -> bool:
    """Return True for an additive mask in a wider dtype than the query."""
    return mask is not None and mask.dtype != torch.bool and mask.dtype != query.dtype
