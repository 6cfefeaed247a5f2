# SPDX-License-Identifier: Apache-2.0
"""The operators ``segkern::*``: schemas, fakes and gradients; kernels are imported at their first launch.

They are opaque to tracers: the backend is chosen and blur tables are made when they run, never in a graph.
Results are laid out ``[batch, tokens, heads, dim]`` in memory, as PyTorch's attention does, and seen as
``[batch, heads, tokens, dim]``. Gradients are compositions of PyTorch operations on the saved inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from segkern.core.dispatch import choose_backend
from segkern.core.fallback import FAILURES, give_up
from segkern.core.gaussian import check_sigma
from segkern.grid import Grid
from segkern.ops import torch_attention

# Tables made inside an operator outlive it, which memory of a compiler's CUDA graph must not.
TAGS = (torch.Tag.cudagraph_unsafe,)


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """The same values laid out ``[batch, tokens, heads, dim]``, seen as ``[batch, heads, tokens, dim]``."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_output(query: torch.Tensor, value_dim: int) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value_dim).transpose(1, 2)


def checked(
    x: torch.Tensor, height: int, width: int, start: int, sigma: Sequence[float]
) -> tuple[Grid, tuple[float, ...]]:
    """Grid and sigmas that fit ``x``; operators can be called, and graphs replayed, around the public functions."""
    grid = Grid(height, width, start)
    grid.check(x.shape[2])
    return grid, check_sigma(sigma, x.shape[0])


@torch.library.custom_op("segkern::gaussian_blur", mutates_args=(), tags=TAGS)
def gaussian_blur(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    boundary: str,
    backend: str,
    adjoint: bool = False,
) -> torch.Tensor:
    """See :func:`segkern.gaussian_blur`; ``adjoint`` applies the transposed blur, which gradients need."""
    grid, sigmas = checked(x, height, width, start, sigma)
    if choose_backend(x.device, x.dtype, x.shape[3], backend, operation="gaussian_blur")[0] == "triton":
        try:
            from segkern.kernels.gaussian_blur import launch_gaussian_blur

            out = _empty_output(x, x.shape[3])
            launch_gaussian_blur(x, out, grid, sigmas, boundary, adjoint)
            return out
        except FAILURES as error:
            give_up(error, backend, "gaussian_blur", x)
    return tokens_first(torch_attention.gaussian_blur(x, grid, sigmas, boundary, adjoint))


@gaussian_blur.register_fake
def _(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    boundary: str,
    backend: str,
    adjoint: bool = False,
) -> torch.Tensor:
    return _empty_output(x, x.shape[3])


def linear_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.arguments, ctx.adjoint = inputs[1:-1], inputs[-1]


def _blur_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return gaussian_blur(grad, *ctx.arguments, not ctx.adjoint), *(None,) * 7


gaussian_blur.register_autograd(_blur_gradient, setup_context=linear_context)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    boundary: str,
    return_lse: bool,
    blur: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator's Triton path without the operator: no gradient, no tracer; arguments are checked already.

    ``blur`` settles where queries are blurred (``_routes.py``), and that the attention is ours.
    """
    from segkern.kernels._routes import sdpa_is_faster
    from segkern.kernels.seg_attention import launch_seg_attention

    simple = blur is None and attn_mask is None and not return_lse and math.inf not in sigmas and any(sigmas)
    if simple and sdpa_is_faster(query.device, query.shape[3], query.dtype):
        from segkern.kernels.gaussian_blur import launch_gaussian_blur

        blurred = _empty_output(query, query.shape[3])
        launch_gaussian_blur(query, blurred, grid, sigmas, boundary)
        out, _ = torch_attention.attend(blurred, key, value, scale, None, False)
        return tokens_first(out), None
    out = _empty_output(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
    launch_seg_attention(query, key, value, out, lse, grid, sigmas, scale, attn_mask, boundary, blur)
    return out, lse


@torch.library.custom_op("segkern::seg_attention", mutates_args=(), tags=TAGS)
def seg_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    scale: float,
    boundary: str,
    backend: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`segkern.seg_attention`; the second result is empty unless ``return_lse``."""
    grid, sigmas = checked(query, height, width, start, sigma)
    return _attend(query, key, value, attn_mask, grid, sigmas, scale, boundary, backend, return_lse)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    boundary: str,
    backend: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    fused = any(sigmas) or query.shape[2] < key.shape[2]  # few rows have a kernel of their own
    chosen, _ = choose_backend(query.device, query.dtype, query.shape[3], backend, value.shape[3], fused)
    if chosen == "triton":
        try:
            out, row_lse = fused_attention(query, key, value, attn_mask, grid, sigmas, scale, boundary, return_lse)
            return out, query.new_empty(0, dtype=torch.float32) if row_lse is None else row_lse
        except FAILURES as error:
            give_up(error, backend, "seg_attention", query)
    out, row_lse = torch_attention.seg_attention(
        query, key, value, grid, sigmas, scale, attn_mask, boundary, return_lse
    )
    lse = query.new_empty(0, dtype=torch.float32) if row_lse is None else row_lse.contiguous()
    return tokens_first(out), lse


@torch.library.custom_op("segkern::seg_attention_at", mutates_args=(), tags=TAGS)
def seg_attention_at(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    height: int,
    width: int,
    start: int,
    sigma: torch.Tensor,
    scale: float,
    boundary: str,
    backend: str,
) -> torch.Tensor:
    """The same with sigmas that are read when it runs, from a CPU tensor ``[batch]``; it has no gradient."""
    grid, sigmas = checked(query, height, width, start, sigma.tolist())
    return _attend(query, key, value, attn_mask, grid, sigmas, scale, boundary, backend, False)[0]


@seg_attention_at.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: object) -> torch.Tensor:
    return _empty_output(query, value.shape[3])


def _empty_attention(query: torch.Tensor, value: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    lse_shape = query.shape[:3] if return_lse else (0,)
    return _empty_output(query, value.shape[3]), query.new_empty(lse_shape, dtype=torch.float32)


@seg_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    scale: float,
    boundary: str,
    backend: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_attention(query, value, return_lse)


@torch.library.custom_op("segkern::seg_attention_backward", mutates_args=(), tags=TAGS)
def seg_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    scale: float,
    boundary: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and an additive mask (empty without one)."""
    grid, sigmas = checked(query, height, width, start, sigma)
    return torch_attention.seg_attention_backward(
        grad_out, grad_lse, query, key, value, attn_mask, grid, sigmas, scale, boundary
    )


@seg_attention_backward.register_fake
def _(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    scale: float,
    boundary: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    mask_shape = (0,) if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.shape
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        query.new_empty(mask_shape),
    )


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.arguments = inputs[4:10]
    ctx.with_lse = inputs[11]
    ctx.set_materialize_grads(False)


def _attention_gradient(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    query, key, value, mask = ctx.saved_tensors
    if grad_out is None:
        grad_out = query.new_zeros(*query.shape[:3], value.shape[3])
    grads = seg_attention_backward(
        grad_out, grad_lse if ctx.with_lse else None, query, key, value, mask, *ctx.arguments
    )
    grad_mask = grads[3] if ctx.needs_input_grad[3] else None
    return *grads[:3], grad_mask, *(None,) * 8


seg_attention.register_autograd(_attention_gradient, setup_context=_attention_context)
