# SPDX-License-Identifier: Apache-2.0
"""A cache of checked calls of attention: the same call comes thousands of times and is checked once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from segkern.core.arguments import check_grid, check_qkv, check_scale
from segkern.core.coarse_queries import check_query_stride, coarse_grid
from segkern.core.dispatch import check_backend, choose_attention_backend
from segkern.core.fallback import failure_count
from segkern.core.gaussian import check_boundary
from segkern.core.sigmas import check_sigma, is_finite_blur
from segkern.grid import Grid

MOST_CALLS = 1024  # remembered; a run has a few dozen


@dataclass(frozen=True)
class CheckedCall:
    """Checked arguments of one kind of call.

    Attributes:
        sigmas: one per sample.
        scale: of the logits.
        stride: of the query rows, height and width.
        coarse: whether some sample leaves out rows.
        backend: ``"torch"`` or ``"triton"``, whichever serves the call; as asked for where a tracer follows it.
        asked: the backend that the caller asked for.
    """

    sigmas: tuple[float, ...]
    scale: float
    stride: tuple[int, int]
    coarse: bool
    backend: str
    asked: str


_CALLS: dict[Any, CheckedCall] = {}
_NUMBERS = {float, int}


def check_attention_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float],
    scale: float | None,
    boundary: str,
    query_stride: int | tuple[int, int],
    backend: str,
    *,
    plain: bool,
) -> CheckedCall:
    """Check all arguments but the mask against each other.

    Args:
        plain: the three are real tensors in an eager run: the backend is chosen, and the call remembered.

    Raises:
        ValueError: when one does not fit; the message quotes it.
    """
    cache_key = None
    if plain and _is_hashable(grid, sigma, scale, query_stride):
        # Backends are chosen anew after kernels have failed.
        tensors = tuple((x.shape, x.dtype, x.device) for x in (query, key, value))
        cache_key = tensors, grid, sigma, scale, boundary, query_stride, backend, failure_count()
        known = _CALLS.get(cache_key)
        if known is not None:
            return known
    check_qkv(query, key, value)
    grid = check_grid(grid, query.shape[2])
    sigmas = check_sigma(sigma, query.shape[0])
    check_boundary(boundary)
    stride = check_query_stride(query_stride)
    scale = check_scale(scale, query)
    check_backend(backend)
    asked = backend
    if plain:
        backend = choose_attention_backend(query, key, value, sigmas, backend)
    coarse = any(map(is_finite_blur, sigmas)) and coarse_grid(grid, stride, boundary).tokens != grid.tokens
    call = CheckedCall(sigmas, scale, stride, coarse, backend, asked)
    if cache_key is not None:
        if len(_CALLS) >= MOST_CALLS:
            _CALLS.clear()
        _CALLS[cache_key] = call
    return call


def forget_calls() -> None:
    """Empty the cache."""
    _CALLS.clear()


def _is_hashable(grid: object, sigma: object, scale: object, stride: object) -> bool:
    """True for numbers as such, not tensors, generators or NumPy's; True equals 1 but is no number here."""
    sigmas = sigma if type(sigma) is tuple else (sigma,)
    strides = stride if type(stride) is tuple else (stride,)
    return (
        type(grid) is Grid
        and _NUMBERS.issuperset(map(type, sigmas))
        and (scale is None or type(scale) in _NUMBERS)
        and {int}.issuperset(map(type, strides))
    )
