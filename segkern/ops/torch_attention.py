# SPDX-License-Identifier: Apache-2.0
"""Attention of blurred queries with PyTorch's own attention, and its gradients.

No N x N matrix is formed, and the queries of unblurred samples are not copied. Each run of samples of one kind (plain,
blurred, infinite) is one call of ``scaled_dot_product_attention``. Samples with infinite sigma use a single query row.
All operations are differentiable PyTorch.
"""

from __future__ import annotations

import math
import threading
from enum import Enum, auto

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from segkern.core.arguments import is_wide
from segkern.core.precision import exact_dtype, full_precision
from segkern.core.private_apis import forward_mode_is_active
from segkern.core.sigmas import equal_runs
from segkern.grid import Grid
from segkern.ops.torch_blur import gaussian_blur, grid_mean, join

_ROWS_AT_ONCE = 1024  # query rows whose logits are formed at a time if PyTorch's attention cannot be used


_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_CHOOSING = threading.Lock()  # PyTorch's backend choice is global to all threads


class _Queries(Enum):
    """The kind of a sample's queries, determined by its sigma."""

    PLAIN = auto()
    BLURRED = auto()
    MEAN = auto()


def _queries_of(sigma: float) -> _Queries:
    if sigma == 0.0:
        return _Queries.PLAIN
    return _Queries.MEAN if math.isinf(sigma) else _Queries.BLURRED


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    attn_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return PyTorch's attention and, if requested, the log-sum-exp of the rows."""
    wide = attn_mask is not None and is_wide(attn_mask, query)
    # PyTorch's attention has no forward-mode derivatives, and on a GPU it rejects a mask of another dtype.
    if forward_mode_is_active() or (wide and query.device.type != "cpu"):
        return _composed_attention(query, key, value, scale, attn_mask, return_lse)
    if wide:
        with full_precision(query.device):  # autocast would round the mask
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    else:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    return output, _composed_attention(query, key, None, scale, attn_mask, True)[1] if return_lse else None


def attend_by(backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute PyTorch's attention with backend ``"flash"``, ``"cudnn"``, ``"efficient"``, or ``"default"`` (automatic).

    If the backend cannot serve the call, PyTorch chooses another.
    """
    if backend == "default":
        return attend(query, key, value, scale, None, False)[0]
    first = _BACKENDS[backend]
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with _CHOOSING, sdpa_kernel([first, *(other for other in others if other != first)], set_priority=True):
        return attend(query, key, value, scale, None, False)[0]


def _composed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    scale: float,
    attn_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention in blocks of rows from operations with all kinds of derivatives; no output without ``value``.

    The log-sum-exp is float32 ``[batch, heads, tokens]``. A row without any key has output 0, log-sum-exp minus
    infinity, and gradients of 0.
    """
    exact = exact_dtype(query)
    key, value = key.to(exact), None if value is None else value.to(exact)
    outputs, lses = [], []
    for first in range(0, query.shape[2], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., rows, :]
        logits, empty = _logits(query[:, :, rows].to(exact), key, scale, mask)
        if value is not None:
            with full_precision(query.device):
                outputs.append(torch.matmul(_probabilities(logits, empty), value))
        if return_lse:
            lse = torch.logsumexp(logits, dim=-1)
            lses.append(lse if empty is None else lse.masked_fill(empty[..., 0], -math.inf))
    if not query.shape[2]:
        nothing = query.new_empty(*query.shape[:3], query.shape[3] if value is None else value.shape[3])
        return nothing, nothing[..., 0].float() if return_lse else None
    output = query if value is None else torch.cat(outputs, dim=2).to(query.dtype)
    return output, torch.cat(lses, dim=-1).float() if return_lse else None


def _logits(
    query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return masked logits ``[batch, heads, rows, keys]`` in the dtype of query and key, regardless of autocast.

    The second result ``[batch, heads, rows, 1]`` marks rows whose keys are all masked. The logits of these rows are 0,
    where softmax and log-sum-exp have finite derivatives.
    """
    with full_precision(query.device):
        logits = torch.matmul(query, key.transpose(-2, -1)) * scale
    if mask is None:
        return logits, None
    masked = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    empty = (masked == -math.inf).all(dim=-1, keepdim=True)
    return masked.masked_fill(empty, 0.0), empty


def _probabilities(logits: torch.Tensor, empty: torch.Tensor | None) -> torch.Tensor:
    weights = torch.softmax(logits, dim=-1)
    return weights if empty is None else weights.masked_fill(empty, 0.0)


def _attend_mean(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    scale: float,
    attn_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention at infinite sigma: one row for the whole image, the other tokens unchanged."""
    if attn_mask is not None and attn_mask.shape[-2] != 1:  # the mask differs between rows, although queries do not
        return attend(
            gaussian_blur(query, grid, (math.inf,) * query.shape[0], "reflect"),
            key,
            value,
            scale,
            attn_mask,
            return_lse,
        )
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
    """Return attention of blurred queries and, if requested, the log-sum-exp. The arguments are already checked."""
    if sigmas and not any(sigmas):
        return attend(query, key, value, scale, attn_mask, return_lse)
    outputs: list[torch.Tensor] = []
    lses: list[torch.Tensor | None] = []
    for samples, kind in equal_runs([_queries_of(sigma) for sigma in sigmas]):
        q, k, v = query[samples], key[samples], value[samples]
        mask = attn_mask[samples] if attn_mask is not None and attn_mask.shape[0] != 1 else attn_mask
        if kind == _Queries.MEAN:
            output, lse = _attend_mean(q, k, v, grid, scale, mask, return_lse)
        else:
            if kind == _Queries.BLURRED:
                q = gaussian_blur(q, grid, sigmas[samples], boundary)
            output, lse = attend(q, k, v, scale, mask, return_lse)
        outputs.append(output)
        lses.append(lse)
    if len(outputs) == 1:
        output, lse = outputs[0], lses[0]
        if kind == _Queries.MEAN:  # the rows are expanded; the caller needs separate memory
            return _own(output), None if lse is None else _own(lse)
        return output, lse
    if not outputs:  # an empty batch
        return _composed_attention(query, key, value, scale, attn_mask, return_lse)
    return join(outputs, dim=0), torch.cat([lse for lse in lses if lse is not None]) if return_lse else None


def _own(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


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
    """Return the gradients of query, key, value and an additive mask. Probabilities are recomputed in blocks of rows.

    The gradients are themselves differentiable.
    """
    exact = exact_dtype(query)
    additive = attn_mask if attn_mask is not None and attn_mask.dtype != torch.bool else None
    blurred = gaussian_blur(query, grid, sigmas, boundary).to(exact)
    k, v, grad = key.to(exact), value.to(exact), grad_out.to(exact)
    grad_blurred, grad_key, grad_value = [], torch.zeros_like(k), torch.zeros_like(v)
    grad_mask = torch.zeros(0 if additive is None else additive.shape, dtype=exact, device=query.device)
    with full_precision(query.device):
        for first in range(0, query.shape[2], _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., rows, :]
            logits, empty = _logits(blurred[:, :, rows], k, scale, mask)
            weights = _probabilities(logits, empty)
            grad_weights = torch.matmul(grad[:, :, rows], v.transpose(-2, -1))
            centre = (grad_weights * weights).sum(dim=-1, keepdim=True)
            if grad_lse is not None:
                of_rows = grad_lse[:, :, rows, None].to(exact)
                centre = centre - (of_rows if empty is None else of_rows.masked_fill(empty, 0.0))
            grad_logits = weights * (grad_weights - centre)
            grad_value = grad_value + torch.matmul(weights.transpose(-2, -1), grad[:, :, rows])
            grad_key = grad_key + torch.matmul(grad_logits.transpose(-2, -1), blurred[:, :, rows]) * scale
            grad_blurred.append(torch.matmul(grad_logits, k) * scale)
            if additive is not None:
                target = grad_mask if grad_mask.shape[-2] == 1 else grad_mask[..., rows, :]
                target += grad_logits.sum_to_size(target.shape)
    grad_query = torch.cat(grad_blurred, dim=2) if grad_blurred else torch.zeros_like(blurred)
    grad_query = gaussian_blur(grad_query, grid, sigmas, boundary, adjoint=True)
    dtype = query.dtype
    return (
        grad_query.to(dtype).contiguous(),
        grad_key.to(dtype).contiguous(),
        grad_value.to(dtype).contiguous(),
        grad_mask.to(dtype if additive is None else additive.dtype),
    )
