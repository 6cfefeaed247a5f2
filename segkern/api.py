# SPDX-License-Identifier: Apache-2.0
"""The public functions: argument checks, documentation, and the choice of the backend."""

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
        grid: Position of the image in the token sequence. Tokens outside it are returned unchanged.
        sigma: Standard deviation in tokens: one number for all samples, or one entry per sample. An entry is a number
            or a sequence of one number per head. 0 copies the tokens; ``math.inf`` replaces every image token with the
            mean of the image. Under ``torch.compile``, Python numbers are constants of the compiled graph, and a CPU
            tensor is read when the graph runs. The result is not differentiable with respect to sigma.
        boundary: ``"reflect"`` (without repeating the edge, as the official implementation does), ``"symmetric"``
            (edge repeated) or ``"circular"``. Only the last two keep the mean exactly.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``. An explicit backend that cannot run raises an error.

    Returns:
        A new tensor with the shape and dtype of ``x``. Sums are computed in float32 (float64 for float64) and rounded
        once.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: SEG (arXiv 2408.00760). Blurring the queries is equivalent to blurring the logits (Proposition 3.1).

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
    """Compute self-attention with queries that are Gaussian-blurred over the token grid.

    Computes ``softmax(scale * blur(query) key^T + mask) value``. Because the blur is linear, this equals attention
    with its *logits* blurred over the queries. With one sigma per sample, a single call can serve unblurred, blurred
    and mean-query samples, for example ``sigma=(0, 0, math.inf)`` for [unconditional, conditional, perturbed].

    Args:
        query: ``[batch, heads, tokens, head_dim]``, any strides, after QK-norm and rotary embedding.
        key: ``[batch, heads, keys, head_dim]``.
        value: ``[batch, heads, keys, value_dim]``.
        grid: Position of the image in the query tokens. Queries outside it are never blurred. For a video, each frame
            is blurred separately before the attention.
        sigma: Standard deviation in tokens, one number or one per sample. 0 is plain attention; ``math.inf`` gives
            every image token the attention output of the mean query. A sample may have a sequence of one sigma per
            head (``[[...]]`` for every sample); neighbouring heads with equal sigmas share one call. Under
            ``torch.compile``, Python numbers are constants of the compiled graph, and new values recompile it. A CPU
            tensor with one sigma, or one per sample, is read when the graph runs; it cannot be combined with
            ``query_stride``. The result is not differentiable with respect to sigma.
        scale: Factor of the logits, a number; ``1 / sqrt(head_dim)`` by default. The result is not differentiable with
            respect to it; to learn a scale, multiply the queries by it and pass ``scale=1``.
        attn_mask: Boolean mask (True: the query attends to the key) or additive mask, broadcastable to
            ``[batch, heads, tokens, keys]``.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``; see :func:`gaussian_blur`.
        query_stride: 1 computes every query row. A larger stride, or a pair for height and width, computes samples with
            a finite sigma only at points at most that many tokens apart and interpolates the output and the log-sum-exp
            between them, because a blurred query changes slowly. This is an approximation. Its error depends on the
            data: it grows with the ratio of stride to sigma, with the spread of the logits, and where a small grid
            clamps the taps. Sampling and interpolation are products of small matrices in PyTorch on every backend; see
            :mod:`segkern.core.coarse_queries`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``. An explicit backend that cannot run raises an error. If a
            kernel fails to compile or launch, ``"auto"`` warns once and uses PyTorch from then on.
        return_lse: Whether to also return the log-sum-exp of each row (natural logarithm). The energy of a row is
            minus its log-sum-exp.

    Returns:
        ``[batch, heads, tokens, value_dim]`` in the dtype of the query (under autocast in the autocast dtype, as for
        PyTorch's attention). With ``return_lse``, also a float32 tensor ``[batch, heads, tokens]``.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

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
            raise ValueError(f"query_stride={query_stride} supports only a grid of one frame, got {grid}")
        query = gaussian_blur(query, grid, sigma, boundary=boundary, backend=backend)
        grid, sigma = Grid(1, 1), 0.0
    if traced and isinstance(sigma, torch.Tensor):
        return _attention_at(
            query, key, value, grid, sigma, scale, attn_mask, boundary, query_stride, backend, return_lse
        )
    if has_head_sigmas(sigma):
        if query_stride not in (1, (1, 1)):
            raise ValueError(f"query_stride={query_stride} supports only one sigma per sample, got {sigma}")
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
    """Return the attention each key receives: ``mass[k] = sum over queries of softmax(scale * query key^T)[:, k]``.

    Every query distributes a mass of 1, so the masses of a head sum to the number of queries. With uniform attention,
    every key receives ``queries / keys``. The matrix of probabilities is never formed.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, any strides; float16, bfloat16, float32 or float64.
        key: ``[batch, heads, keys, head_dim]`` in the dtype of the query. There may be more or fewer keys than queries.
        scale: Factor of the logits; ``1 / sqrt(head_dim)`` by default.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``. An explicit backend that cannot run raises an error.

    Returns:
        A float32 tensor ``[batch, heads, keys]``, or float64 for float64 inputs. Products and sums are never rounded
        to half precision.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: Self-Attention Guidance (arXiv 2210.00939), which masks the keys whose mass exceeds 1.

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
    """Return the energy of each query's row of logits, ``-logsumexp(scale * blur(query) key^T)`` (natural logarithm).

    If the boundary keeps the mean, blurring the queries raises the sum of the energies over the grid. Smoothed Energy
    Guidance is named after this; see :mod:`segkern.energy`. The result is minus the log-sum-exp that
    ``seg_attention(..., return_lse=True)`` returns, without the cost of the values.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, any strides; float16, bfloat16, float32 or float64.
        key: ``[batch, heads, keys, head_dim]`` in the dtype of the query.
        grid: Position of the image in the query tokens. Optional if every sigma is 0.
        sigma: Standard deviation of the blur in tokens, one number or one per sample. 0 is no blur; ``math.inf`` gives
            every image token the energy of the mean query, which is computed once.
        scale: Factor of the logits; ``1 / sqrt(head_dim)`` by default.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``; see :func:`segkern.gaussian_blur`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``. An explicit backend that cannot run raises an error.

    Returns:
        A float32 tensor ``[batch, heads, tokens]``, or float64 for float64 inputs. Blurred queries are rounded to the
        dtype of the query.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

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
    """Compute every query row. ``plain`` is the result of :func:`is_plain` for the tensors."""
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
    """Compute every query row with sigmas that are read when the graph runs."""
    if query_stride not in (1, (1, 1)):
        raise ValueError(
            f"query_stride={query_stride} needs sigma as a number while a call is compiled or traced, got a tensor"
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
            f"query_stride={stride} interpolates between query rows, but attn_mask {tuple(mask.shape)} has one row per "
            f"query; pass query_stride=1 or a mask [batch, heads, 1, keys]"
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
    """Compute samples with a finite sigma at the points of the coarse grid, and the other samples at every token."""
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
    """Interpolate the log-sum-exp to all tokens. If every key is masked, it is minus infinity in all rows."""
    masked = (lse == -math.inf).all(dim=-1, keepdim=True)
    every_token = coarse_outputs(lse.masked_fill(masked, 0.0)[..., None], grid, stride, boundary)[..., 0]
    return every_token.masked_fill(masked, -math.inf)


def _chosen(backend: str, operation: str, query: torch.Tensor, key: torch.Tensor) -> str:
    """Return the backend that serves the call, or the requested one if the call is traced."""
    check_backend(backend)
    backend = differentiable_backend(backend, query, key)
    if is_plain(query, key):
        backend, _ = choose_backend(query.device, query.dtype, query.shape[3], backend, operation=operation)
    return backend
