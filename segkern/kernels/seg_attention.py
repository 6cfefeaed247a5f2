# SPDX-License-Identifier: Apache-2.0
"""Launcher of attention with blurred queries. It computes every sample of a batch with the kernels of its route."""

from __future__ import annotations

from functools import lru_cache

import torch

from segkern.grid import Grid
from segkern.kernels._configs import architecture, has_descriptors
from segkern.kernels._launch import can_be_described, strides_are_wide
from segkern.kernels._routes import BlurPlace, attention_route
from segkern.kernels.split_attention import launch_split_attention, launch_uniform_attention
from segkern.kernels.tiled_attention import launch_tiled_attention
from segkern.kernels.unmasked_attention import launch_unmasked_attention


def launch_seg_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    attn_mask: torch.Tensor | None,
    boundary: str,
    place: BlurPlace | None = None,
) -> None:
    """Write attention of blurred queries to ``out`` and, if given, the log-sum-exp of the rows to ``lse``.

    The few-row kernel serves samples with infinite sigma, and calls with few unblurred rows. For a sample with infinite
    sigma, the other kernels compute only tokens outside the grid. ``place`` fixes where queries are blurred; see
    ``_routes.py``.
    """
    if query.numel() == 0:
        return
    if scale < 0.0:  # kernels compute the maximum before scaling
        query, scale = -query, -scale
    rows_alike = attn_mask is None or attn_mask.shape[2] == 1
    unmasked = (
        attn_mask is None
        and key.shape[2] > 0
        and _are_usual(query.stride(), key.stride(), value.stride(), out.stride())
    )
    described = unmasked and has_descriptors(architecture(query.device)) and can_be_described(key, value)
    kind = query.device, query.dtype, query.shape, key.shape[2]
    route = attention_route(*kind, grid, sigmas, boundary, unmasked, described, rows_alike, place)
    if route.uniform:
        launch_uniform_attention(query, key, value, out, lse, grid, route.uniform, scale, attn_mask)
    if route.matrices is not None:
        tensors, blurs = (query, key, value, out, lse), (grid, sigmas, route, route.matrices)
        if unmasked:
            launch_unmasked_attention(*tensors, *blurs, scale, boundary, described)
        else:
            launch_tiled_attention(*tensors, *blurs, scale, attn_mask, boundary)
    elif route.rest:
        launch_split_attention(query, key, value, out, lse, route.rest, scale, attn_mask)


@lru_cache(maxsize=1024)
def _are_usual(*strides: tuple[int, ...]) -> bool:
    """Return True if channels are contiguous and offsets inside a tile fit 32 bits."""
    return all(n[3] == 1 for n in strides) and not strides_are_wide(*strides)
