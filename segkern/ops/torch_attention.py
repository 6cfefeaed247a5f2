# SPDX-License-Identifier: Apache-2.0
"""The PyTorch path: separable blur by matrix products, then PyTorch's own attention.

Nothing of size N x N is formed and the queries of unblurred samples are not copied: each run of samples of one kind
(plain, blurred, infinite) is one call of ``scaled_dot_product_attention``, and samples of infinite sigma
run it on a single query row. All of it is differentiable PyTorch.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from segkern.core.coarse_queries import cached_interpolation_matrix, cached_sampling_matrix, coarse_grid
from segkern.core.gaussian import cached_blur_matrix
from segkern.core.sigmas import equal_runs
from segkern.grid import Grid

_PLAIN, _BLURRED, _UNIFORM = range(3)

_ROWS_AT_ONCE = 1024  # logits of so many query rows are formed at a time when only their log-sum-exp is wanted


def _kind(sigma: float) -> int:
    if sigma == 0.0:
        return _PLAIN
    return _UNIFORM if math.isinf(sigma) else _BLURRED


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside: blur weights and logits keep their dtype."""
    kind = device.type
    # Meta tensors, for example, know no autocast.
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(device_type=kind, enabled=False)


def grid_mean(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Mean token of the image, ``[batch, heads, 1, dim]`` in the input's dtype."""
    image = x[:, :, grid.start : grid.stop]
    return image.mean(dim=2, keepdim=True, dtype=compute_dtype(x.dtype)).to(x.dtype)


def _mix_image(image: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Apply a matrix to each axis of ``[batch, heads, height * width, dim]``: ``rows`` to height, ``columns`` to width.

    Works on a channels-last view ``[batch, height, width, heads * dim]`` where the layout allows it, so that each
    axis is one matrix product over long contiguous rows: first over the width, then over the height.
    """
    batch, heads, _, dim = image.shape
    (new_height, height), (new_width, width) = rows.shape, columns.shape
    x = image.transpose(1, 2).to(rows.dtype)  # [batch, tokens, heads, dim]
    x = x.reshape(batch * height, width, heads * dim)
    with full_precision(image.device):
        x = torch.matmul(columns, x)  # [batch * height, new_width, heads * dim]
        x = x.view(batch, height, new_width * heads * dim)
        x = torch.matmul(rows, x)  # [batch, new_height, new_width * heads * dim]
    return x.view(batch, new_height * new_width, heads, dim).transpose(1, 2).to(image.dtype)


def _mix_grid(x: torch.Tensor, grid: Grid, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``_mix_image`` of the grid's tokens; those outside pass through."""
    image = _mix_image(x[:, :, grid.start : grid.stop], rows, columns)
    if grid.tokens == x.shape[2]:
        return image
    return join([x[:, :, : grid.start], image, x[:, :, grid.stop :]], dim=2)


def _blur_run(x: torch.Tensor, grid: Grid, sigma: float, boundary: str, adjoint: bool = False) -> torch.Tensor:
    """Blur a run of samples of one positive sigma; tokens outside the grid pass through."""
    if not math.isinf(sigma):
        rows, columns = (
            cached_blur_matrix(length, sigma, boundary, dtype=compute_dtype(x.dtype), device=x.device)
            for length in (grid.height, grid.width)
        )
        if adjoint:
            rows, columns = rows.T, columns.T
        return _mix_grid(x, grid, rows, columns)
    image = grid_mean(x, grid).expand(-1, -1, grid.tokens, -1)  # the mean over the grid is its own adjoint
    if grid.tokens == x.shape[2]:
        return image
    return torch.cat([x[:, :, : grid.start], image, x[:, :, grid.stop :]], dim=2)


def gaussian_blur(
    x: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], boundary: str, adjoint: bool = False
) -> torch.Tensor:
    """Blur ``[batch, heads, tokens, dim]``, one sigma per sample; ``adjoint`` applies the transposed blur."""
    parts = [
        x[samples] if sigma == 0.0 else _blur_run(x[samples], grid, sigma, boundary, adjoint)
        for samples, sigma in equal_runs(sigmas)
    ]
    if not parts:  # an empty batch
        return torch.empty_like(x)
    if len(parts) > 1:
        return join(parts, dim=0)
    # An unblurred part is the caller's memory, an infinite one an expanded row: the result must be neither.
    return parts[0].clone(memory_format=torch.contiguous_format) if _kind(sigmas[0]) != _BLURRED else parts[0]


def coarse_queries(
    x: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    stride: tuple[int, int],
    boundary: str,
    adjoint: bool = False,
) -> torch.Tensor:
    """The blurred image at the points of its coarse grid, one finite sigma per sample.

    The tokens of ``grid`` in ``[batch, heads, tokens, dim]`` give way to those of its coarse grid; ``adjoint`` applies
    the transpose, which brings them back.
    """
    coarse = coarse_grid(grid, stride, boundary)
    compute = compute_dtype(x.dtype)
    parts = []
    for samples, sigma in equal_runs(sigmas):
        matrices = [
            cached_sampling_matrix(n, sigma, m, boundary, dtype=compute, device=x.device)
            for n, m in ((grid.height, coarse.height), (grid.width, coarse.width))
        ]
        if adjoint:
            parts.append(_mix_grid(x[samples], coarse, matrices[0].T, matrices[1].T))
        else:
            parts.append(_mix_grid(x[samples], grid, *matrices))
    if not parts:  # an empty batch
        into = grid if adjoint else coarse
        return x.new_empty(0, x.shape[1], x.shape[2] - (coarse if adjoint else grid).tokens + into.tokens, x.shape[3])
    return parts[0] if len(parts) == 1 else join(parts, dim=0)


def coarse_outputs(
    y: torch.Tensor, grid: Grid, stride: tuple[int, int], boundary: str, adjoint: bool = False
) -> torch.Tensor:
    """From the points of the coarse grid to all tokens of ``grid``; ``adjoint`` applies the transpose."""
    coarse = coarse_grid(grid, stride, boundary)
    compute = compute_dtype(y.dtype)
    rows, columns = (
        cached_interpolation_matrix(n, m, boundary, dtype=compute, device=y.device)
        for n, m in ((grid.height, coarse.height), (grid.width, coarse.width))
    )
    return _mix_grid(y, grid, rows.T, columns.T) if adjoint else _mix_grid(y, coarse, rows, columns)


def join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate ``[batch, heads, tokens, dim]`` parts, keeping attention's tokens-before-heads memory order."""
    swapped = {0: 0, 2: 1}[dim]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=swapped).transpose(1, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    attn_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """PyTorch's attention and, if asked for, the rows' log-sum-exp."""
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    return output, _row_lse(query, key, scale, attn_mask) if return_lse else None


def _row_lse(query: torch.Tensor, key: torch.Tensor, scale: float, attn_mask: torch.Tensor | None) -> torch.Tensor:
    """Log-sum-exp of the rows' logits in float32, ``[batch, heads, tokens]``, a block of rows at a time."""
    compute = compute_dtype(query.dtype)
    blocks = []
    for first in range(0, query.shape[2], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., rows, :]
        logits = _logits(query[:, :, rows].to(compute), key.to(compute), scale, mask)
        blocks.append(torch.logsumexp(logits, dim=-1))
    return torch.cat(blocks, dim=-1).float() if blocks else query.new_empty(query.shape[:3], dtype=torch.float32)


def _logits(query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Masked logits ``[batch, heads, rows, keys]`` in the dtype of query and key, autocast or not."""
    with full_precision(query.device):
        logits = torch.matmul(query, key.transpose(-2, -1)) * scale
    if mask is None:
        return logits
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)


def _attend_uniform(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    scale: float,
    attn_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention at infinite sigma: one row for the whole image, the other tokens as they are."""
    if attn_mask is not None and attn_mask.shape[-2] != 1:  # the mask makes rows differ although queries do not
        return attend(_blur_run(query, grid, math.inf, "reflect"), key, value, scale, attn_mask, return_lse)
    row, row_lse = attend(grid_mean(query, grid), key, value, scale, attn_mask, return_lse)
    image = row.expand(-1, -1, grid.tokens, -1)
    image_lse = None if row_lse is None else row_lse.expand(-1, -1, grid.tokens)
    if grid.tokens == query.shape[2]:
        return image, image_lse
    before, before_lse = attend(query[:, :, : grid.start], key, value, scale, attn_mask, return_lse)
    after, after_lse = attend(query[:, :, grid.stop :], key, value, scale, attn_mask, return_lse)
    output = join([before, image, after], dim=2)
    if image_lse is None or before_lse is None or after_lse is None:
        return output, None
    return output, torch.cat([before_lse, image_lse, after_lse], dim=2)


def seg_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    boundary: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of blurred queries and, if asked for, the rows' log-sum-exp; arguments are checked already."""
    if sigmas and not any(sigmas):
        return attend(query, key, value, scale, attn_mask, return_lse)
    outputs: list[torch.Tensor] = []
    lses: list[torch.Tensor | None] = []
    for samples, kind in equal_runs([_kind(sigma) for sigma in sigmas]):
        q, k, v = query[samples], key[samples], value[samples]
        mask = attn_mask[samples] if attn_mask is not None and attn_mask.shape[0] != 1 else attn_mask
        if kind == _UNIFORM:
            output, lse = _attend_uniform(q, k, v, grid, scale, mask, return_lse)
        else:
            if kind == _BLURRED:
                q = gaussian_blur(q, grid, sigmas[samples], boundary)
            output, lse = attend(q, k, v, scale, mask, return_lse)
        outputs.append(output)
        lses.append(lse)
    if len(outputs) == 1:
        # An expanded row looks like a tensor of its own to the caller, so it must be one.
        return outputs[0].contiguous() if kind == _UNIFORM else outputs[0], lses[0]
    if not outputs:  # an empty batch
        return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)
    return join(outputs, dim=0), torch.cat([lse for lse in lses if lse is not None]) if return_lse else None


def seg_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    boundary: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and an additive mask, probabilities recomputed a block of rows at a time."""
    compute = compute_dtype(query.dtype)
    additive = attn_mask if attn_mask is not None and attn_mask.dtype != torch.bool else None
    blurred = gaussian_blur(query, grid, sigmas, boundary).to(compute)
    k, v, grad = key.to(compute), value.to(compute), grad_out.to(compute)
    grad_blurred, grad_key, grad_value = torch.empty_like(blurred), torch.zeros_like(k), torch.zeros_like(v)
    grad_mask = torch.zeros(0 if additive is None else additive.shape, dtype=compute, device=query.device)
    with full_precision(query.device):
        for first in range(0, query.shape[2], _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., rows, :]
            logits = _logits(blurred[:, :, rows], k, scale, mask)
            weights = torch.softmax(logits, dim=-1)
            if mask is not None:  # a row whose keys are all masked attends to nothing
                weights = weights.masked_fill((logits == float("-inf")).all(dim=-1, keepdim=True), 0.0)
            grad_weights = torch.matmul(grad[:, :, rows], v.transpose(-2, -1))
            centre = (grad_weights * weights).sum(dim=-1, keepdim=True)
            if grad_lse is not None:
                centre = centre - grad_lse[:, :, rows, None].to(compute)
            grad_logits = weights * (grad_weights - centre)
            grad_value += torch.matmul(weights.transpose(-2, -1), grad[:, :, rows])
            grad_key += torch.matmul(grad_logits.transpose(-2, -1), blurred[:, :, rows]) * scale
            grad_blurred[:, :, rows] = torch.matmul(grad_logits, k) * scale
            if additive is not None:
                target = grad_mask if grad_mask.shape[-2] == 1 else grad_mask[..., rows, :]
                target += grad_logits.sum_to_size(target.shape)
    grad_query = gaussian_blur(grad_blurred, grid, sigmas, boundary, adjoint=True)
    dtype = query.dtype
    return (
        grad_query.to(dtype).contiguous(),
        grad_key.to(dtype).contiguous(),
        grad_value.to(dtype).contiguous(),
        grad_mask.to(dtype),
    )
