# SPDX-License-Identifier: Apache-2.0
"""What the arguments of an attention come down to. The same call comes thousands of times: it is checked once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from segkern.core.arguments import check_grid, check_qkv, check_scale
from segkern.core.coarse_queries import check_query_stride, coarse_grid
from segkern.core.dispatch import check_backend, choose_backend
from segkern.core.gaussian import check_boundary, check_sigma
from segkern.grid import Grid

_MOST_PLANS = 1024  # kept; a run has a few dozen


@dataclass(frozen=True)
class Plan:
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


_PLANS: dict[Any, Plan] = {}


def plan_attention(
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
) -> Plan:
    """Check all arguments but the mask against each other.

    Args:
        plain: the three are real tensors in an eager run: the backend is chosen, and the plan kept.

    Raises:
        ValueError: when one does not fit; the message quotes it.
    """
    kept = None
    if plain and _is_kept(grid, sigma, scale, query_stride):
        # type() beside a value: True equals 1 but is no number here.
        tensors = tuple((x.shape, x.dtype, x.device) for x in (query, key, value))
        kept = tensors, grid, sigma, scale, boundary, query_stride, backend
        found = _PLANS.get(kept)
        if found is not None:
            return found
    check_qkv(query, key, value)
    grid = check_grid(grid, query.shape[2])
    sigmas = check_sigma(sigma, query.shape[0])
    check_boundary(boundary)
    stride = check_query_stride(query_stride)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else check_scale(scale)
    check_backend(backend)
    asked = backend
    if plain:
        fused = any(sigmas) or query.shape[2] < key.shape[2]  # few rows have a kernel of their own
        backend, _ = choose_backend(query.device, query.dtype, query.shape[3], backend, value.shape[3], fused)
    plan = Plan(sigmas, scale, stride, leaves_out_rows(grid, sigmas, boundary, stride), backend, asked)
    if kept is not None:
        if len(_PLANS) >= _MOST_PLANS:
            _PLANS.clear()
        _PLANS[kept] = plan
    return plan


def forget_plans() -> None:
    """Choose backends anew: kernels have failed."""
    _PLANS.clear()


def _is_kept(grid: object, sigma: object, scale: object, stride: object) -> bool:
    """Whether a plan can be found by these: numbers as such, not tensors, generators or NumPy's."""
    sigmas = sigma if type(sigma) is tuple else (sigma,)
    strides = stride if type(stride) is tuple else (stride,)
    return (
        type(grid) is Grid
        and _NUMBERS.issuperset(map(type, sigmas))
        and (scale is None or type(scale) in _NUMBERS)
        and {int}.issuperset(map(type, strides))
    )


_NUMBERS = {float, int}


def takes_points(sigma: float) -> bool:
    """Whether a sample's queries are smooth without being all the same."""
    return 0.0 < sigma < math.inf


def leaves_out_rows(grid: Grid, sigmas: tuple[float, ...], boundary: str, stride: tuple[int, int]) -> bool:
    """Whether some sample is computed at fewer points than its grid has tokens."""
    return any(map(takes_points, sigmas)) and coarse_grid(grid, stride, boundary).tokens != grid.tokens
