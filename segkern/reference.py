# SPDX-License-Identifier: Apache-2.0
"""Reference implementations in plain PyTorch, against which kernels and fast paths are tested.

They are neither fast nor memory-efficient. Half-precision inputs are computed in float32 and rounded where the kernels
round: blurred queries and outputs to the dtype of the input. float64 stays float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from segkern.core.coarse_queries import check_query_stride, coarse_grid, interpolation_matrix, sampling_matrix
from segkern.core.gaussian import blur_matrix, check_boundary
from segkern.core.precision import compute_dtype, exact_dtype
from segkern.core.sigmas import check_sigma, has_head_sigmas, head_sigmas
from segkern.grid import Grid


def gaussian_blur(
    x: torch.Tensor, grid: Grid, sigma: float | Iterable[float | Sequence[float]], *, boundary: str = "reflect"
) -> torch.Tensor:
    """Blur ``x`` ``[batch, heads, tokens, dim]`` over its token grid; see :func:`segkern.gaussian_blur`."""
    check_boundary(boundary)
    grid.check(x.shape[2])
    if has_head_sigmas(sigma):
        by_head = zip(*head_sigmas(sigma, *x.shape[:2]), strict=True)
        heads = [
            gaussian_blur(x[:, [h]], grid, sigmas[0] if len(sigmas) == 1 else sigmas, boundary=boundary)
            for h, sigmas in enumerate(by_head)
        ]
        return torch.cat(heads, dim=1)
    exact = exact_dtype(x)
    if grid.frames > 1:
        for frame in range(grid.frames):
            one = Grid(grid.height, grid.width, grid.start + frame * grid.height * grid.width)
            x = gaussian_blur(x, one, sigma, boundary=boundary)
        return x
    samples = [torch.empty_like(x)[:0]]
    for sample, value in enumerate(check_sigma(sigma, x.shape[0])):  # type: ignore[arg-type]
        tokens = x[sample : sample + 1]
        if value != 0.0:
            rows = blur_matrix(grid.height, value, boundary, dtype=exact, device=x.device)
            columns = blur_matrix(grid.width, value, boundary, dtype=exact, device=x.device)
            tokens = _along_axes(tokens, grid, rows, columns)
        samples.append(tokens)
    return torch.cat(samples)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``softmax(scale * query key^T + mask) value`` and the log-sum-exp of the rows (natural logarithm).

    A row whose keys are all masked has output 0, as in PyTorch, and a log-sum-exp of minus infinity.
    """
    logits = _logits(query, key, scale)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        else:
            logits = logits + attn_mask.to(logits.dtype)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.softmax(logits, dim=-1).masked_fill((lse == float("-inf"))[..., None], 0.0)
    output = torch.matmul(weights, value.to(weights.dtype))
    return output.to(query.dtype), lse.to(compute_dtype(query.dtype))


def attention_mass(query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """Return, for each key, the sum of its probabilities over the queries; see :func:`segkern.attention_mass`."""
    return torch.softmax(_logits(query, key, scale), dim=-1).sum(dim=-2).to(compute_dtype(query.dtype))


def attention_energy(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid | None = None,
    sigma: float | Iterable[float] = 0.0,
    *,
    scale: float | None = None,
    boundary: str = "reflect",
) -> torch.Tensor:
    """Return minus the log-sum-exp of every blurred query's logits; see :func:`segkern.attention_energy`."""
    if grid is not None:
        query = gaussian_blur(query, grid, sigma, boundary=boundary)
    elif any(check_sigma(sigma, query.shape[0])):
        raise ValueError(f"a blur needs a grid, got grid=None and sigma={sigma}")
    return -torch.logsumexp(_logits(query, key, scale), dim=-1).to(compute_dtype(query.dtype))


def _logits(query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
    exact = exact_dtype(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.matmul(query.to(exact), key.to(exact).transpose(-2, -1)) * scale


def seg_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float | Sequence[float]],
    *,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
    boundary: str = "reflect",
    query_stride: int | tuple[int, int] = 1,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of blurred queries; see :func:`segkern.seg_attention`. A float64 log-sum-exp stays float64."""
    stride = check_query_stride(query_stride)
    if stride != (1, 1):
        if has_head_sigmas(sigma):
            raise ValueError(f"query_stride={query_stride} supports only one sigma per sample, got {sigma}")
        output, lse = _coarse_attention(query, key, value, grid, sigma, scale, attn_mask, boundary, stride)  # type: ignore[arg-type]
        return (output, lse) if return_lse else output
    blurred = gaussian_blur(query, grid, sigma, boundary=boundary)
    output, lse = attention(blurred, key, value, scale=scale, attn_mask=attn_mask)
    return (output, lse) if return_lse else output


def _coarse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float],
    scale: float | None,
    attn_mask: torch.Tensor | None,
    boundary: str,
    stride: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute queries at the points of the coarse grid, then interpolate output and log-sum-exp to all tokens."""
    grid.check(query.shape[2])
    if attn_mask is not None and attn_mask.ndim > 1 and attn_mask.shape[-2] != 1:
        raise ValueError(
            f"a mask with one row per query {tuple(attn_mask.shape)} cannot be interpolated; pass query_stride=1"
        )
    coarse = coarse_grid(grid, stride, boundary)
    sizes = ((grid.height, coarse.height), (grid.width, coarse.width))
    outputs = [query.new_empty(0, *query.shape[1:3], value.shape[3])]
    lses = [query.new_empty(0, *query.shape[1:3], dtype=compute_dtype(query.dtype))]
    for sample, value_of_sigma in enumerate(check_sigma(sigma, query.shape[0])):
        one = slice(sample, sample + 1)
        mask = attn_mask if attn_mask is None or attn_mask.ndim < 4 or attn_mask.shape[0] == 1 else attn_mask[one]
        if not 0.0 < value_of_sigma < math.inf:
            blurred = gaussian_blur(query[one], grid, value_of_sigma, boundary=boundary)
            output, lse = attention(blurred, key[one], value[one], scale=scale, attn_mask=mask)
        else:
            into = [sampling_matrix(n, value_of_sigma, m, boundary, dtype=torch.float64) for n, m in sizes]
            back = [interpolation_matrix(n, m, boundary, dtype=torch.float64) for n, m in sizes]
            rows = _along_axes(query[one], grid, *into)
            output, lse = attention(rows, key[one], value[one], scale=scale, attn_mask=mask)
            output = _along_axes(output, coarse, *back)
            nothing = (lse == -math.inf).all(dim=-1, keepdim=True)  # every key is masked, in all rows
            lse = _along_axes(lse.masked_fill(nothing, 0.0)[..., None], coarse, *back)[..., 0]
            lse = lse.masked_fill(nothing, -math.inf)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


def _along_axes(x: torch.Tensor, grid: Grid, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Apply a matrix to each axis of the grid's tokens in ``[batch, heads, tokens, dim]``; leave other tokens as is."""
    exact = exact_dtype(x)
    image = x[:, :, grid.start : grid.stop].to(exact).unflatten(2, (grid.height, grid.width))
    rows, columns = rows.to(x.device, exact), columns.to(x.device, exact)
    mixed = torch.einsum("ik,jl,bnkld->bnijd", rows, columns, image).flatten(2, 3)
    return torch.cat([x[:, :, : grid.start], mixed.to(x.dtype), x[:, :, grid.stop :]], dim=2)
