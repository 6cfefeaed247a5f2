# SPDX-License-Identifier: Apache-2.0
"""The public functions: what they mean, what they accept, and the way to the backend that serves them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.autograd import forward_ad

from segkern import ops, sdpa
from segkern.blur import check_boundary, check_sigma, runs
from segkern.coarse import check_query_stride, coarse_grid
from segkern.dispatch import check_backend, choose_backend
from segkern.grid import Grid


def gaussian_blur(
    x: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float],
    *,
    boundary: str = "reflect",
    backend: str = "auto",
) -> torch.Tensor:
    """Blur tokens over their grid with a Gaussian: ``B_h X B_w^T`` for every channel.

    Args:
        x: ``[batch, heads, tokens, dim]``, any strides; float16, bfloat16, float32 or float64.
        grid: where the image lies in the tokens; the others pass through unchanged.
        sigma: standard deviation in tokens, one number or one per sample; 0 copies, ``math.inf`` replaces
            every image token by the mean of the image.
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
    _check_tensor("x", x)
    grid = _check_grid(grid, x.shape[2])
    sigmas = check_sigma(sigma, x.shape[0])
    check_boundary(boundary)
    check_backend(backend)
    backend = _differentiable(backend, x)
    if _is_plain(x) and choose_backend(x.device, x.dtype, x.shape[3], backend)[0] == "torch":
        return sdpa.gaussian_blur(x, grid, sigmas, boundary)
    return ops.gaussian_blur(x, grid.height, grid.width, grid.start, sigmas, boundary, backend)


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
        grid: where the image lies in the query tokens; the other queries are never blurred.
        sigma: standard deviation in tokens, one number or one per sample; 0 is plain attention, ``math.inf``
            gives every image token the attention output of the mean query.
        scale: of the logits; ``1 / sqrt(head_dim)`` by default.
        attn_mask: boolean (True takes part) or additive, broadcastable to ``[batch, heads, tokens, keys]``.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``; see :func:`gaussian_blur`.
        query_stride: 1 computes every query row. With more, or a pair for height and width, samples of finite sigma
            are computed at points that are so many tokens apart at most, and interpolated between, log-sum-exp
            included: a blurred query changes slowly. It is an approximation whose error depends on the data: it
            grows with the stride over sigma, with the logits' swing, and where a small grid clamps the taps.
            Sampling and interpolation are products of small matrices in PyTorch on every backend; see
            :mod:`segkern.coarse`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; an explicit choice that cannot run raises its reason.
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
    _check_qkv(query, key, value)
    query, key, value = _autocast(query, key, value)
    grid = _check_grid(grid, query.shape[2])
    sigmas = check_sigma(sigma, query.shape[0])
    check_boundary(boundary)
    stride = check_query_stride(query_stride)
    mask = _check_mask(attn_mask, query, key)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else _check_scale(scale)
    check_backend(backend)
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    backend = _differentiable(backend, *tensors)
    if coarse_grid(grid, stride, boundary).tokens != grid.tokens and any(map(_takes_points, sigmas)):
        output, lse = _coarse_attention(
            query, key, value, grid, sigmas, scale, mask, boundary, stride, backend, return_lse
        )
    else:
        output, lse = _attention(query, key, value, grid, sigmas, scale, mask, boundary, backend, return_lse)
    if not return_lse:
        return output
    assert lse is not None
    return output, lse


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    mask: torch.Tensor | None,
    boundary: str,
    backend: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every query row; arguments are checked already."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if _is_plain(*tensors) and _backend_of(query, value, sigmas, backend) == "torch":
        return sdpa.seg_attention(query, key, value, grid, sigmas, scale, mask, boundary, return_lse)
    output, lse = ops.seg_attention(
        query, key, value, mask, grid.height, grid.width, grid.start, sigmas, scale, boundary, backend, return_lse
    )
    return output, lse if return_lse else None


def _takes_points(sigma: float) -> bool:
    """Whether a sample's queries are smooth without being all the same."""
    return 0.0 < sigma < math.inf


def _coarse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    mask: torch.Tensor | None,
    boundary: str,
    stride: tuple[int, int],
    backend: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Samples of finite sigma at the points of the coarse grid, the others as ever; arguments are checked already."""
    if mask is not None and mask.shape[2] != 1:
        raise ValueError(
            f"query_stride={stride} interpolates between query rows, which a mask with rows of its own "
            f"{tuple(mask.shape)} does not allow; take query_stride=1 or a mask [batch, heads, 1, keys]"
        )
    outputs, lses = [], []
    for samples, coarse in runs([_takes_points(sigma) for sigma in sigmas]):
        q, k, v, s = query[samples], key[samples], value[samples], sigmas[samples]
        m = mask[samples] if mask is not None and mask.shape[0] != 1 else mask
        if coarse:
            q = _coarse_queries(q, grid, s, stride, boundary)
            unblurred = (0.0,) * len(s)
            output, lse = _attention(q, k, v, Grid(1, 1), unblurred, scale, m, boundary, backend, return_lse)
            output = _coarse_outputs(output, grid, stride, boundary)
            lse = None if lse is None else _coarse_lse(lse, grid, stride, boundary)
        else:
            output, lse = _attention(q, k, v, grid, s, scale, m, boundary, backend, return_lse)
        outputs.append(output)
        lses.append(lse)
    if len(outputs) == 1:
        return outputs[0], lses[0]
    return sdpa.join(outputs, dim=0), torch.cat([lse for lse in lses if lse is not None]) if return_lse else None


def _coarse_lse(lse: torch.Tensor, grid: Grid, stride: tuple[int, int], boundary: str) -> torch.Tensor:
    """Log-sum-exp of all tokens; minus infinity, where every key is masked, is so in all rows alike."""
    masked = (lse == -math.inf).all(dim=-1, keepdim=True)
    found = _coarse_outputs(lse.masked_fill(masked, 0.0)[..., None], grid, stride, boundary)[..., 0]
    return found.masked_fill(masked, -math.inf)


def _coarse_queries(
    x: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], stride: tuple[int, int], boundary: str
) -> torch.Tensor:
    if _is_plain(x):
        return sdpa.coarse_queries(x, grid, sigmas, stride, boundary)
    return ops.coarse_queries(x, grid.height, grid.width, grid.start, sigmas, stride, boundary)


def _coarse_outputs(x: torch.Tensor, grid: Grid, stride: tuple[int, int], boundary: str) -> torch.Tensor:
    if _is_plain(x):
        return sdpa.coarse_outputs(x, grid, stride, boundary)
    return ops.coarse_outputs(x, grid.height, grid.width, grid.start, stride, boundary)


def _backend_of(query: torch.Tensor, value: torch.Tensor, sigmas: tuple[float, ...], backend: str) -> str:
    return choose_backend(query.device, query.dtype, query.shape[3], backend, value.shape[3], any(sigmas))[0]


def _is_plain(*tensors: torch.Tensor) -> bool:
    """Whether these are real tensors in an eager run, none that a tracer follows.

    Only then may tables be made here, and a backend be chosen; operators do both when they run.
    """
    if torch.compiler.is_compiling():
        return False
    return all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)


def _differentiable(backend: str, *tensors: torch.Tensor) -> str:
    """The backend, or PyTorch's path where forward-mode derivatives are wanted, which operators do not have."""
    if torch.compiler.is_compiling() or all(forward_ad.unpack_dual(x).tangent is None for x in tensors):
        return backend
    if backend == "triton":
        raise ValueError("backend='triton' has no forward-mode derivatives; take backend='torch'")
    return "torch"


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What autocast does to the arguments of PyTorch's attention."""
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_tensor(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a tensor [batch, heads, tokens, dim], got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions [batch, heads, tokens, dim], got shape {tuple(x.shape)}")
    if x.shape[3] == 0:
        raise ValueError(f"{name} must have at least one channel, got shape {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def _check_scale(scale: float) -> float:
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    return float(scale)


def _check_grid(grid: Grid, tokens: int) -> Grid:
    if not isinstance(grid, Grid):
        raise ValueError(f"grid must be a segkern.Grid(height, width, start=0), got {grid!r}")
    grid.check(tokens)
    return grid


def _check_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, x)
        if x.dtype != query.dtype:
            raise ValueError(f"query, key and value must share a dtype, got {query.dtype} and {name} in {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"query, key and value must share a device, got {query.device} and {name} on {x.device}")
        if x.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"query, key and value must share batch and heads, got query {tuple(query.shape)} and "
                f"{name} {tuple(x.shape)}"
            )
    if key.shape[3] != query.shape[3] or value.shape[2] != key.shape[2]:
        raise ValueError(
            f"key must be [batch, heads, keys, head_dim of query] and value [batch, heads, keys, value_dim], got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if key.shape[2] == 0:
        raise ValueError(f"attention needs at least one key, got key {tuple(key.shape)}")


def _check_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The mask with 4 dimensions, each of the full size or 1."""
    if mask is None:
        return None
    full = (*query.shape[:3], key.shape[2])
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"attn_mask must be a tensor, got {type(mask).__name__}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device {query.device}, got {mask.device}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"attn_mask must be boolean or floating point, got {mask.dtype}")
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(size not in (1, want) for size, want in zip(shape, full, strict=True)):
        raise ValueError(f"attn_mask must be broadcastable to [batch, heads, tokens, keys] = {full}, got {shape}")
    mask = mask.reshape(shape)
    return mask if mask.dtype == torch.bool else mask.to(query.dtype)
