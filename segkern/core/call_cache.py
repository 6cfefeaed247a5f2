# SPDX-License-Identifier: Apache-2.0
"""A cache of checked attention calls: a call that is repeated thousands of times is checked once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from segkern.core.arguments import check_grid, check_qkv, check_scale, scale_of
from segkern.core.coarse_queries import check_query_stride, coarse_grid
from segkern.core.dispatch import check_backend, choose_attention_backend
from segkern.core.fallback import failure_count
from segkern.core.gaussian import check_boundary
from segkern.core.sigmas import for_batch, given_sigmas, is_finite_blur
from segkern.grid import Grid

MOST_CALLS = 1024  # a run has a few dozen different calls


@dataclass(frozen=True)
class CheckedCall:
    """The checked arguments of one kind of call.

    Attributes:
        sigmas: One sigma per sample. In a traced call, it may be one sigma for all samples, which fits batches of any
            size.
        scale: Factor of the logits. In a traced call, None means ``1 / sqrt(head_dim)``.
        stride: Stride of the query rows, height and width.
        coarse: Whether any sample is computed at fewer query rows than tokens.
        backend: The backend that serves the call, ``"torch"`` or ``"triton"``; in a traced call, the requested one.
        asked: The backend that the caller requested.
    """

    sigmas: tuple[float, ...]
    scale: float | None
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
    wide_mask: bool = False,
) -> CheckedCall:
    """Check all arguments except the mask, each one separately and then in combination.

    Args:
        plain: Whether query, key and value are real tensors in eager mode. If so, a backend is chosen and the
            call is cached.
        wide_mask: See :func:`segkern.core.dispatch.choose_attention_backend`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.
    """
    cache_key = None
    if plain and _is_hashable(grid, sigma, scale, query_stride, boundary, backend):
        # The backend is chosen again after kernels have failed.
        tensors = tuple((x.shape, x.dtype, x.device) for x in (query, key, value))
        cache_key = tensors, grid, sigma, scale, boundary, query_stride, backend, wide_mask, failure_count()
        known = _CALLS.get(cache_key)
        if known is not None:
            return known
    check_qkv(query, key, value)
    grid = check_grid(grid, query.shape[2])
    sigmas = given_sigmas(sigma, query.shape[0])
    check_boundary(boundary)
    stride = check_query_stride(query_stride)
    scale = check_scale(scale)
    check_backend(backend)
    asked = backend
    if plain:
        sigmas, scale = for_batch(sigmas, query.shape[0]), scale_of(scale, query)
        backend = choose_attention_backend(query, key, value, sigmas, backend, wide_mask)
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


def _is_hashable(grid: object, sigma: object, scale: object, stride: object, boundary: object, backend: object) -> bool:
    """Return True for plain Python numbers, not tensors, generators or NumPy numbers. True equals 1 but is excluded."""
    sigmas = sigma if type(sigma) is tuple else (sigma,)
    strides = stride if type(stride) is tuple else (stride,)
    return (
        type(grid) is Grid
        and _NUMBERS.issuperset(map(type, sigmas))
        and (scale is None or type(scale) in _NUMBERS)
        and {int}.issuperset(map(type, strides))
        and type(boundary) is type(backend) is str
    )
