# SPDX-License-Identifier: Apache-2.0
"""The operators ``segkern::gaussian_blur`` and ``segkern::seg_attention*``. Kernels are imported on first launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from segkern.core.arguments import is_wide, scale_of
from segkern.core.dispatch import choose_attention_backend, choose_backend
from segkern.core.fallback import run_with_fallback
from segkern.grid import Grid
from segkern.ops import torch_attention, torch_blur
from segkern.ops.operators import (
    check_call,
    empty_output,
    host_reading_operator,
    materialised,
    operator,
    owned,
    save_linear,
    tokens_first,
)

if TYPE_CHECKING:
    from segkern.kernels._routes import BlurPlace


def fused_blur(
    x: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], boundary: str, adjoint: bool = False
) -> torch.Tensor:
    """Blur with Triton kernels. The arguments are already checked."""
    from segkern.kernels.gaussian_blur import launch_gaussian_blur

    x = materialised(x)
    out = empty_output(x, x.shape[3])
    launch_gaussian_blur(x, out, grid, sigmas, boundary, adjoint)
    return out


def _blur(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    boundary: str,
    backend: str,
    adjoint: bool,
) -> torch.Tensor:
    grid, sigmas = check_call(x, height, width, start, sigma, boundary)
    if choose_backend(x.device, x.dtype, x.shape[3], backend, operation="gaussian_blur")[0] == "torch":
        return tokens_first(torch_blur.gaussian_blur(x, grid, sigmas, boundary, adjoint))
    blurs = fused_blur, torch_blur.gaussian_blur
    return tokens_first(run_with_fallback("gaussian_blur", backend, *blurs, x, grid, sigmas, boundary, adjoint))


@operator("segkern::gaussian_blur")
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
    """See :func:`segkern.gaussian_blur`. ``sigma`` has one entry or one per sample; ``adjoint`` transposes the blur."""
    return _blur(x, height, width, start, sigma, boundary, backend, adjoint)


@host_reading_operator("segkern::gaussian_blur_at")
def gaussian_blur_at(
    x: torch.Tensor,
    height: int,
    width: int,
    start: int,
    sigma: torch.Tensor,
    boundary: str,
    backend: str,
    adjoint: bool = False,
) -> torch.Tensor:
    """Blur like ``segkern::gaussian_blur``, with sigmas read at run time from a CPU tensor ``[1]`` or ``[batch]``."""
    return _blur(x, height, width, start, sigma.tolist(), boundary, backend, adjoint)


@gaussian_blur.register_fake
@gaussian_blur_at.register_fake
def _(x: torch.Tensor, *arguments: object, adjoint: bool = False) -> torch.Tensor:
    return empty_output(x, x.shape[3])


def _blur_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return gaussian_blur(grad, *ctx.arguments, not ctx.adjoint), *(None,) * 7


def _blur_at_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (sigma,) = ctx.saved_tensors
    height, width, start, boundary, backend = ctx.arguments
    return gaussian_blur_at(grad, height, width, start, sigma, boundary, backend, not ctx.adjoint), *(None,) * 7


def _save_sigma(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, height, width, start, sigma, boundary, backend, ctx.adjoint = inputs
    ctx.save_for_backward(sigma)
    ctx.arguments = height, width, start, boundary, backend


gaussian_blur.register_autograd(_blur_gradient, setup_context=save_linear)
gaussian_blur_at.register_autograd(_blur_at_gradient, setup_context=_save_sigma)


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
    place: BlurPlace | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with Triton kernels in a call without gradients or a tracer. Arguments are already checked.

    If ``place`` is given, it sets where queries are blurred (``_routes.py``), and our attention kernels are used.
    """
    from segkern.kernels._routes import faster_sdpa
    from segkern.kernels.seg_attention import launch_seg_attention

    query, key, value = materialised(query), materialised(key), materialised(value)
    attn_mask = None if attn_mask is None else materialised(attn_mask)
    if place is None and attn_mask is None and not return_lse and any(sigmas):
        sdpa = faster_sdpa(query.device, query.shape[3], query.dtype, query.shape[2])
        if sdpa is not None:
            return _blur_and_pytorch(query, key, value, grid, sigmas, scale, boundary, sdpa), None
    out = empty_output(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
    launch_seg_attention(query, key, value, out, lse, grid, sigmas, scale, attn_mask, boundary, place)
    return out, lse


def _blur_and_pytorch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    boundary: str,
    sdpa: str,
) -> torch.Tensor:
    """Combine our blur with PyTorch's attention by a backend, and our few-row kernel for samples with infinite sigma.

    Without infinite samples, the launch that blurs also gathers the plain queries, so one attention call serves the
    batch. This moves fewer bytes than joining two outputs. With infinite samples, the output of the plain samples is
    copied.
    """
    from segkern.kernels._blur_matrices import consecutive
    from segkern.kernels.split_attention import launch_uniform_attention

    if math.inf not in sigmas:
        blurred = fused_blur(query, grid, sigmas, boundary)
        return tokens_first(torch_attention.attend_by(sdpa, blurred, key, value, scale))
    if scale < 0.0:  # kernels compute the maximum before scaling
        query, scale = -query, -scale
    out = empty_output(query, value.shape[3])
    uniform = tuple(i for i, sigma in enumerate(sigmas) if math.isinf(sigma))
    launch_uniform_attention(query, key, value, out, None, grid, uniform, scale, None)
    parts = [(run, slice(None)) for run in consecutive(tuple(i for i in range(len(sigmas)) if i not in uniform))]
    for run in consecutive(uniform):
        parts += [(run, slice(0, grid.start)), (run, slice(grid.stop, query.shape[2]))]
    for run, tokens in parts:
        rows = query[run, :, tokens]
        if tokens == slice(None) and any(sigmas[run]):
            rows = fused_blur(rows, grid, sigmas[run], boundary)
        if rows.shape[2]:
            out[run, :, tokens] = torch_attention.attend_by(sdpa, rows, key[run], value[run], scale)
    return out


def run_attention(chosen: str, asked: str, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with the chosen backend. See :func:`fused_attention` for ``arguments``."""
    if chosen == "torch":
        return torch_attention.seg_attention(*arguments)
    return run_with_fallback("seg_attention", asked, fused_attention, torch_attention.seg_attention, *arguments)


@operator("segkern::seg_attention")
def seg_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    scale: float | None,
    boundary: str,
    backend: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`segkern.seg_attention`. The second result is empty unless ``return_lse``."""
    out, lse = _attend(query, key, value, attn_mask, height, width, start, sigma, scale, boundary, backend, return_lse)
    return out, query.new_empty(0, dtype=torch.float32) if lse is None else owned(lse.contiguous())


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the common part of the operators. ``arguments`` are the remaining arguments of ``segkern::seg_attention``."""
    height, width, start, sigma, scale, boundary, backend, return_lse = arguments
    grid, sigmas = check_call(query, height, width, start, sigma, boundary)
    chosen = choose_attention_backend(query, key, value, sigmas, backend, is_wide(attn_mask, query))
    rest = grid, sigmas, scale_of(scale, query), boundary, return_lse
    out, lse = run_attention(chosen, backend, query, key, value, attn_mask, *rest)
    return tokens_first(out), lse


@seg_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    lse_shape = query.shape[:3] if arguments[-1] else (0,)  # return_lse
    return empty_output(query, value.shape[3]), query.new_empty(lse_shape, dtype=torch.float32)


@host_reading_operator("segkern::seg_attention_at")
def seg_attention_at(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    height: int,
    width: int,
    start: int,
    sigma: torch.Tensor,
    scale: float | None,
    boundary: str,
    backend: str,
) -> torch.Tensor:
    """Attend like ``segkern::seg_attention``, with sigmas read at run time from a CPU tensor; no gradient."""
    where = height, width, start, sigma.tolist()
    return _attend(query, key, value, attn_mask, *where, scale, boundary, backend, False)[0]


@seg_attention_at.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: object) -> torch.Tensor:
    return empty_output(query, value.shape[3])


@operator("segkern::seg_attention_backward")
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
    scale: float | None,
    boundary: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key, value and an additive mask (empty without one)."""
    tensors = grad_out, grad_lse, query, key, value, attn_mask
    return _attend_backward(*tensors, height, width, start, sigma, scale, boundary)


def _attend_backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, query: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients outside the operator, where they can be differentiated again. Same arguments."""
    key, value, attn_mask, height, width, start, sigma, scale, boundary = arguments
    grid, sigmas = check_call(query, height, width, start, sigma, boundary)
    tensors = grad_out, grad_lse, query, key, value, attn_mask
    return torch_attention.seg_attention_backward(*tensors, grid, sigmas, scale_of(scale, query), boundary)


@seg_attention_backward.register_fake
def _(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    *arguments: object,
) -> tuple[torch.Tensor, ...]:
    additive = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask
    grad_mask = query.new_empty(0) if additive is None else additive.new_empty(additive.shape)
    return (*(x.new_empty(x.shape) for x in (query, key, value)), grad_mask)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
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
    # Compositions of PyTorch operations can be differentiated again; operators cannot.
    backward = _attend_backward if torch.is_grad_enabled() else seg_attention_backward
    grads = backward(grad_out, grad_lse if ctx.with_lse else None, query, key, value, mask, *ctx.arguments)
    grad_mask = grads[3] if ctx.needs_input_grad[3] else None
    return *grads[:3], grad_mask, *(None,) * 8


seg_attention.register_autograd(_attention_gradient, setup_context=_save_attention)
