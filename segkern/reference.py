# SPDX-License-Identifier: Apache-2.0
"""Every operation in plain PyTorch: the specification that kernels and fast paths are tested against.

Nothing here is fast or saves memory. Half-precision inputs are computed in float32 and rounded where the kernels
round: blurred queries and outputs to the input's dtype. float64 stays float64 throughout.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from segkern.blur import blur_matrix, check_boundary, check_sigma
from segkern.grid import Grid


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gaussian_blur(
    x: torch.Tensor, grid: Grid, sigma: float | Iterable[float], *, boundary: str = "reflect"
) -> torch.Tensor:
    """Blur ``x`` ``[batch, heads, tokens, dim]`` over its token grid; see :func:`segkern.gaussian_blur`."""
    check_boundary(boundary)
    grid.check(x.shape[2])
    compute = _compute_dtype(x.dtype)
    out = x.clone()
    for sample, value in enumerate(check_sigma(sigma, x.shape[0])):
        if value == 0.0:
            continue
        rows = blur_matrix(grid.height, value, boundary, dtype=compute, device=x.device)
        columns = blur_matrix(grid.width, value, boundary, dtype=compute, device=x.device)
        image = x[sample, :, grid.start : grid.stop].to(compute).unflatten(1, (grid.height, grid.width))
        blurred = torch.einsum("ik,jl,nkld->nijd", rows, columns, image)
        out[sample, :, grid.start : grid.stop] = blurred.flatten(1, 2).to(x.dtype)
    return out


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * query key^T + mask) value`` and the rows' log-sum-exp (natural logarithm).

    A row whose keys are all masked gives 0 and a log-sum-exp of minus infinity, as PyTorch's does.
    """
    compute = _compute_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.matmul(query.to(compute), key.to(compute).transpose(-2, -1)) * scale
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        else:
            logits = logits + attn_mask.to(compute)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.softmax(logits, dim=-1).masked_fill((lse == float("-inf"))[..., None], 0.0)
    return torch.matmul(weights, value.to(compute)).to(query.dtype), lse


def seg_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float],
    *,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
    boundary: str = "reflect",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of blurred queries; see :func:`segkern.seg_attention`. The log-sum-exp keeps float64 for float64."""
    blurred = gaussian_blur(query, grid, sigma, boundary=boundary)
    output, lse = attention(blurred, key, value, scale=scale, attn_mask=attn_mask)
    return (output, lse) if return_lse else output
