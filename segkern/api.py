# SPDX-License-Identifier: Apache-2.0
"""The public functions: what they mean, what they accept, and the way to the backend that serves them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from segkern.core.arguments import (
    check_grid,
    check_mask,
    check_qk,
    check_qkv,
    check_scale,
    check_tensor,
    is_wide,
    scale_of,
)
from segkern.core.call_cache import CheckedCall, check_attention_call
from segkern.core.dispatch import check_backend, choose_backend
from segkern.core.gaussian import check_boundary
from segkern.core.parts import blur_by_frame, call_by_head
from segkern.core.sigmas import (
    check_traced_sigma,
    equal_runs,
    for_batch,
    given_sigmas,
    has_head_sigmas,
    head_sigmas,
    is_finite_blur,
)
from segkern.core.tracing import (
    autocast_inputs,
    can_skip_operator,
    check_not_jit_traced,
    differentiable_backend,
    fixed_numbers,
    fixed_sigmas,
    is_plain,
    is_traced,
    is_transformed,
)
from segkern.grid import Grid
from segkern.ops import attention, masses, torch_blur, torch_masses
from segkern.ops.coarse import coarse_outputs, coarse_queries


def gaussian_blur(
    x: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float | Sequence[float]],
    *,
    boundary: str = "reflect",
    backend: str = "auto",
) -> torch.Tensor:
    """Blur tokens over their grid with a Gaussian: ``B_h X B_w^T`` for every channel.

    Args:
        x: ``[batch, heads, tokens, dim]``, any strides; float16, bfloat16, float32 or float64.
        grid: where the image lies in the tokens; the others pass through unchanged.
        sigma: standard deviation in tokens, one number or one per sample, or for a sample a sequence of one per
            head; 0 copies, ``math.inf`` replaces every image token by the mean of the image. Under ``torch.compile``
            numbers become part of what is compiled; a CPU tensor is read when the graph runs. There are no derivatives
            with respect to sigma.
        boundary: ``"reflect"`` (without repeating the edge, as the official implementation does), ``"symmetric"``
            (edge repeated) or ``"circular"``. Only the last two keep the mean exactly.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; an explicit choice that cannot run raises its reason.

    Returns:
        A new tensor of x's shape and dtype. Sums are taken in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: when an argument does not fit; the message quotes it.

    Source: SEG (arXiv 2408.00760); blurring queries equals blurring logits (Proposition 3.1).

    Example:
        >>> x = torch.randn(2, 4, 6 * 9, 16)
        >>> gaussian_blur(x, Grid(6, 9), sigma=1.5).shape
        torch.Size([2, 4, 54, 16])
    """
    check_tensor("x", x)
    grid, sigma = check_grid(grid, x.shape[2], video=True), fixed_sigmas(sigma)
    if grid.frames > 1:
        return blur_by_frame(partial(gaussian_blur, boundary=boundary, backend=backend), x, grid, sigma)
    check_boundary(boundary)
    check_backend(backend)
    where = grid.height, grid.width, grid.start
    if is_traced() and isinstance(sigma, torch.Tensor):
        sigma = check_traced_sigma(sigma, x.shape[0])
        return attention.gaussian_blur_at(x, *where, sigma, boundary, differentiable_backend(backend, x))
    if has_head_sigmas(sigma):
        blur_heads = partial(gaussian_blur, grid=grid, boundary=boundary, backend=backend)
        return call_by_head(blur_heads, (x,), head_sigmas(sigma, *x.shape[:2]))
    sigmas = given_sigmas(sigma, x.shape[0])  # type: ignore[arg-type]
    backend = differentiable_backend(backend, x)
    if is_plain(x) and choose_backend(x.device, x.dtype, x.shape[3], backend, operation="gaussian_blur")[0] == "torch":
        return torch_blur.gaussian_blur(x, grid, for_batch(sigmas, x.shape[0]), boundary)
    return attention.gaussian_blur(x, *where, sigmas, boundary, backend)


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
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Self-attention whose queries are Gaussian-blurred over the token grid.

    ``softmax(scale * blur(query) key^T + mask) value``, which by linearity is attention with its *logits* blurred
    over the queries. One sigma per sample lets one call serve a batch of unblurred, blurred and infinite samples,
    for example ``sigma=(0, 0, math.inf)`` for [unconditional, conditional, perturbed].

    Args:
        query: ``[batch, heads, tokens, head_dim]``, any strides, after QK-norm and rotary embedding.
        key: ``[batch, heads, keys, head_dim]``.
        value: ``[batch, heads, keys, value_dim]``.
        grid: where the image lies in the query tokens; the other queries are never blurred. The frames of a video are
            blurred each by itself, before the attention.
        sigma: standard deviation in tokens, one number or one per sample; 0 is plain attention, ``math.inf``
            gives every image token the attention output of the mean query. A sample may have a sequence of one sigma
            per head (``[[...]]`` for every sample); neighbouring heads that agree are one call. Under
            ``torch.compile`` numbers become part of what is compiled, and other numbers are compiled anew; a CPU
            tensor of one sigma, or of one per sample, is read when the graph runs. It takes no ``query_stride``. There
            are no derivatives with respect to sigma.
        scale: of the logits, a number; ``1 / sqrt(head_dim)`` by default. There are no derivatives with respect to it;
            one that is learnt multiplies the queries, beside ``scale=1``.
        attn_mask: boolean (True takes part) or additive, broadcastable to ``[batch, heads, tokens, keys]``.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``; see :func:`gaussian_blur`.
        query_stride: 1 computes every query row. With more, or a pair for height and width, samples of finite sigma
            are computed at points that are so many tokens apart at most, and interpolated between, log-sum-exp
            included: a blurred query changes slowly. It is an approximation whose error depends on the data: it
            grows with the stride over sigma, with the logits' swing, and where a small grid clamps the taps.
            Sampling and interpolation are products of small matrices in PyTorch on every backend; see
            :mod:`segkern.core.coarse_queries`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; an explicit choice that cannot run raises its reason. Should
            a kernel fail to compile or to launch, ``"auto"`` warns once and takes PyTorch's path from then on.
        return_lse: also return the rows' log-sum-exp (natural logarithm); minus it is the row's energy.

    Returns:
        ``[batch, heads, tokens, value_dim]`` in the query's dtype (under autocast in its dtype, as PyTorch's
        attention); with ``return_lse`` also float32 ``[batch, heads, tokens]``.

    Raises:
        ValueError: when an argument does not fit; the message quotes it.

    Source: SEG (arXiv 2408.00760), Proposition 3.1.

    Example:
        >>> import math
        >>> q, k, v = torch.randn(3, 2, 8, 26 * 38, 64)
        >>> seg_attention(q, k, v, Grid(26, 38), sigma=(0.0, math.inf)).shape
        torch.Size([2, 8, 988, 64])
    """
    query, key, value = autocast_inputs(check_tensor, query=query, key=key, value=value)
    traced = is_traced()
    if traced:
        sigma, scale = fixed_sigmas(sigma), fixed_numbers(scale)
    if isinstance(grid, Grid) and grid.frames > 1:
        if query_stride not in (1, (1, 1)):
            raise ValueError(f"query_stride={query_stride} takes a grid of one frame, got {grid}")
        query = gaussian_blur(query, grid, sigma, boundary=boundary, backend=backend)
        grid, sigma = Grid(1, 1), 0.0
    if traced and isinstance(sigma, torch.Tensor):
        return _attention_at(
            query, key, value, grid, sigma, scale, attn_mask, boundary, query_stride, backend, return_lse
        )
    if has_head_sigmas(sigma):
        if query_stride not in (1, (1, 1)):
            raise ValueError(f"query_stride={query_stride} takes one sigma per sample, got {sigma}")
        check_qkv(query, key, value)
        options: Any = {"scale": scale, "boundary": boundary, "backend": backend, "return_lse": return_lse}
        attend_heads = partial(seg_attention, grid=grid, **options)
        sigmas, mask = head_sigmas(sigma, *query.shape[:2]), check_mask(attn_mask, query, key)
        return call_by_head(attend_heads, (query, key, value), sigmas, mask)
    plain = is_plain(query, key, value) if attn_mask is None else is_plain(query, key, value, attn_mask)
    arguments: Any = (grid, sigma, scale, boundary, query_stride, backend)
    wide = isinstance(attn_mask, torch.Tensor) and isinstance(query, torch.Tensor) and is_wide(attn_mask, query)
    call = check_attention_call(query, key, value, *arguments, plain=plain, wide_mask=wide)
    mask = None if attn_mask is None else check_mask(attn_mask, query, key)
    asked = differentiable_backend(backend, query, key, value, *(() if mask is None else (mask,)))
    if asked != backend:
        call = replace(call, backend=asked, asked=asked)
    attend = _coarse_attention if call.coarse else _attention
    output, lse = attend(query, key, value, grid, call, mask, boundary, return_lse, plain)
    if not return_lse:
        return output
    assert lse is not None
    return output, lse


def attention_mass(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """The attention that each key receives: ``mass[k] = sum over queries of softmax(scale * query key^T)[:, k]``.

    Every query gives away a mass of 1, so that the masses of a head sum to the number of queries, and a key that
    receives as much as all others has ``queries / keys``. The matrix of probabilities is never formed.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, any strides; float16, bfloat16, float32 or float64.
        key: ``[batch, heads, keys, head_dim]`` of the query's dtype; there may be more or fewer keys than queries.
        scale: of the logits; ``1 / sqrt(head_dim)`` by default.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; an explicit choice that cannot run raises its reason.

    Returns:
        float32 ``[batch, heads, keys]``, float64 for float64: products and sums are never rounded to half precision.

    Raises:
        ValueError: when an argument does not fit; the message quotes it.

    Source: Self-Attention Guidance (arXiv 2210.00939), whose mask is where the masses exceed 1.

    Example:
        >>> q, k = torch.randn(2, 2, 8, 26 * 38, 64)
        >>> mass = attention_mass(q, k)
        >>> mass.shape, bool((mass.sum(dim=-1) - 988).abs().max() < 0.01)
        (torch.Size([2, 8, 988]), True)
    """
    query, key = autocast_inputs(check_tensor, query=query, key=key)
    check_qk(query, key)
    scale = check_scale(fixed_numbers(scale))
    chosen = _chosen(backend, "attention_mass", query, key)
    if chosen == "torch" and is_transformed():
        return torch_masses.composed_mass(query, key, scale_of(scale, query))
    if not (is_plain(query, key) and can_skip_operator(query, key)):
        return masses.attention_mass(query, key, scale, backend if chosen == "triton" else chosen)
    return masses.run_mass(chosen, backend, query, key, scale_of(scale, query))


def attention_energy(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid | None = None,
    sigma: float | Iterable[float] = 0.0,
    *,
    scale: float | None = None,
    boundary: str = "reflect",
    backend: str = "auto",
) -> torch.Tensor:
    """The energy of each query's row of logits, ``-logsumexp(scale * blur(query) key^T)``, natural logarithm.

    A blur of the queries raises the sum of the energies over the grid, where its boundary keeps the mean: that is what
    Smoothed Energy Guidance is named after; :mod:`segkern.energy` has more of it. It is minus what
    ``seg_attention(..., return_lse=True)`` gives, without values and the work on them.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, any strides; float16, bfloat16, float32 or float64.
        key: ``[batch, heads, keys, head_dim]`` of the query's dtype.
        grid: where the image lies in the query tokens; it may be left out where every sigma is 0.
        sigma: of the blur in tokens, one number or one per sample; 0 is no blur, ``math.inf`` gives every image token
            the energy of the mean query, of which one row is computed.
        scale: of the logits; ``1 / sqrt(head_dim)`` by default.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``; see :func:`segkern.gaussian_blur`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; an explicit choice that cannot run raises its reason.

    Returns:
        float32 ``[batch, heads, tokens]``, float64 for float64. Blurred queries are rounded to their dtype.

    Raises:
        ValueError: when an argument does not fit; the message quotes it.

    Source: SEG (arXiv 2408.00760), section 3: the energy of modern Hopfield networks.

    Example:
        >>> q, k = torch.randn(2, 2, 8, 26 * 38, 64)
        >>> plain, blurred = (attention_energy(q, k, Grid(26, 38), s, boundary="symmetric") for s in (0.0, 2.0))
        >>> plain.shape, bool((blurred.sum(dim=-1) > plain.sum(dim=-1)).all())
        (torch.Size([2, 8, 988]), True)
    """
    query, key = autocast_inputs(check_tensor, query=query, key=key)
    check_qk(query, key)
    sigma = fixed_sigmas(sigma)
    if is_traced() and isinstance(sigma, torch.Tensor):
        if grid is None:
            raise ValueError(f"a tensor of sigmas needs a grid, segkern.Grid(height, width), got {grid=}")
        query, sigma = gaussian_blur(query, grid, sigma, boundary=boundary, backend=backend), 0.0
    sigmas = given_sigmas(sigma, query.shape[0])
    if grid is None and any(sigmas):
        raise ValueError(f"a sigma other than 0 needs a grid, segkern.Grid(height, width), got grid=None, {sigma=}")
    if grid is not None:
        check_grid(grid, query.shape[2])
    check_boundary(boundary)
    scale = check_scale(fixed_numbers(scale))
    chosen = _chosen(backend, "attention_energy", query, key)
    composed = (chosen == "torch" and is_transformed()) or (grid is None and query.shape[2] == 0)
    grid = Grid(1, 1) if grid is None else grid
    if composed or (is_plain(query, key) and can_skip_operator(query, key)):
        rest = query, key, grid, for_batch(sigmas, query.shape[0]), scale_of(scale, query), boundary
        return torch_masses.composed_energy(*rest) if composed else masses.run_energy(chosen, backend, *rest)
    where, asked = (grid.height, grid.width, grid.start), backend if chosen == "triton" else chosen
    return masses.attention_energy(query, key, *where, sigmas, scale, boundary, asked)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    call: CheckedCall,
    mask: torch.Tensor | None,
    boundary: str,
    return_lse: bool,
    plain: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every query row; ``plain`` as :func:`is_plain` says of the tensors."""
    if plain:
        rest = for_batch(call.sigmas, query.shape[0]), scale_of(call.scale, query), boundary, return_lse
        if call.backend == "torch" or can_skip_operator(query, key, value, mask):
            return attention.run_attention(call.backend, call.asked, query, key, value, mask, grid, *rest)
    where = (grid.height, grid.width, grid.start)
    backend = call.asked if call.backend == "triton" else call.backend
    output, lse = attention.seg_attention(
        query, key, value, mask, *where, call.sigmas, call.scale, boundary, backend, return_lse
    )
    return output, lse if return_lse else None


def _attention_at(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigma: torch.Tensor,
    scale: float | None,
    attn_mask: torch.Tensor | None,
    boundary: str,
    query_stride: int | tuple[int, int],
    backend: str,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Every query row, with sigmas that are known when it runs."""
    if query_stride not in (1, (1, 1)):
        raise ValueError(
            f"query_stride={query_stride} takes numbers as sigma while a call is compiled or traced, got a tensor"
        )
    check_qkv(query, key, value)
    sigmas = check_traced_sigma(sigma, query.shape[0])
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if return_lse or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        query = gaussian_blur(query, grid, sigma, boundary=boundary, backend=backend)
        options: Any = {"scale": scale, "attn_mask": attn_mask, "backend": backend, "return_lse": return_lse}
        return seg_attention(query, key, value, Grid(1, 1), 0.0, **options)
    call = check_attention_call(query, key, value, grid, 0.0, scale, boundary, 1, backend, plain=False)
    asked = differentiable_backend(backend, *tensors)
    mask = None if attn_mask is None else check_mask(attn_mask, query, key)
    where = (grid.height, grid.width, grid.start)
    return attention.seg_attention_at(query, key, value, mask, *where, sigmas, call.scale, boundary, asked)


def _check_one_row(mask: torch.Tensor | None, stride: tuple[int, int]) -> None:
    if mask is not None and mask.shape[2] != 1:
        raise ValueError(
            f"query_stride={stride} interpolates between query rows, which a mask with rows of its own "
            f"{tuple(mask.shape)} does not allow; take query_stride=1 or a mask [batch, heads, 1, keys]"
        )


def _coarse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    call: CheckedCall,
    mask: torch.Tensor | None,
    boundary: str,
    return_lse: bool,
    plain: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Samples of finite sigma at the points of the coarse grid, the others as ever."""
    stride = call.stride
    _check_one_row(mask, stride)
    outputs, lses = [], []
    runs = equal_runs([is_finite_blur(sigma) for sigma in call.sigmas])
    if len(runs) > 1:
        check_not_jit_traced(f"query_stride={stride} for some samples of a batch")
    for samples, at_points in runs:
        sigmas, whole = call.sigmas[samples], len(runs) == 1
        q, k, v = (query, key, value) if whole else (query[samples], key[samples], value[samples])
        m = mask if whole or mask is None or mask.shape[0] == 1 else mask[samples]
        if at_points:
            q = coarse_queries(q, grid, sigmas, stride, boundary)
            unblurred = replace(call, sigmas=(0.0,))
            output, lse = _attention(q, k, v, Grid(1, 1), unblurred, m, boundary, return_lse, plain)
            output = coarse_outputs(output, grid, stride, boundary)
            lse = None if lse is None else _coarse_lse(lse, grid, stride, boundary)
        else:
            output, lse = _attention(q, k, v, grid, replace(call, sigmas=sigmas), m, boundary, return_lse, plain)
        outputs.append(output)
        lses.append(lse)
    if len(outputs) == 1:
        return outputs[0], lses[0]
    return torch_blur.join(outputs, dim=0), torch.cat([lse for lse in lses if lse is not None]) if return_lse else None


def _coarse_lse(lse: torch.Tensor, grid: Grid, stride: tuple[int, int], boundary: str) -> torch.Tensor:
    """Log-sum-exp of all tokens; minus infinity, where every key is masked, is so in all rows alike."""
    masked = (lse == -math.inf).all(dim=-1, keepdim=True)
    every_token = coarse_outputs(lse.masked_fill(masked, 0.0)[..., None], grid, stride, boundary)[..., 0]
    return every_token.masked_fill(masked, -math.inf)


def _chosen(backend: str, operation: str, query: torch.Tensor, key: torch.Tensor) -> str:
    """The backend that serves the call; as asked for where a tracer follows it."""
    check_backend(backend)
    backend = differentiable_backend(backend, query, key)
    if is_plain(query, key):
        backend, _ = choose_backend(query.device, query.dtype, query.shape[3], backend, operation=operation)
    return backend
