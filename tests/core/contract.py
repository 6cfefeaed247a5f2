# SPDX-License-Identifier: Apache-2.0
"""The numerics contract, and test inputs for it.

Compared with the float64 reference, the error of a result may be at most twice the error of the same computation in
plain PyTorch at the input's dtype, plus eps(dtype) times the largest reference value, as maximum and as root mean
square.
"""

from __future__ import annotations

import math

import torch

from segkern import Grid, reference
from segkern.core.gaussian import blur_matrix
from segkern.core.sigmas import check_sigma


def assert_contract(actual: torch.Tensor, oracle: torch.Tensor, plain: torch.Tensor) -> None:
    """Check ``actual`` under the contract. ``plain`` is plain PyTorch's result at the input's dtype."""
    assert actual.shape == oracle.shape
    assert actual.isfinite().all(), f"{(~actual.isfinite()).sum()} elements are not finite"
    allowance = torch.finfo(plain.dtype).eps * oracle.abs().max()
    error, plain_error = actual.double() - oracle, plain.double() - oracle
    for name, norm in (("maximum", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        size, allowed = norm(error), 2 * norm(plain_error) + allowance
        assert size <= allowed, f"{name} error {size:.3e} exceeds {allowed:.3e}"


def plain_blur(x: torch.Tensor, grid: Grid, sigma: object, boundary: str = "reflect") -> torch.Tensor:
    """Blur in plain PyTorch at the input's dtype: matrices are rounded to it and products are computed in it."""
    out = x.clone()
    for sample, value in enumerate(check_sigma(sigma, x.shape[0])):
        if value == 0.0:
            continue
        rows, columns = (
            blur_matrix(n, value, boundary, dtype=x.dtype, device=x.device) for n in (grid.height, grid.width)
        )
        image = x[sample, :, grid.start : grid.stop].unflatten(1, (grid.height, grid.width))
        image = torch.einsum("jl,nkld->nkjd", columns, image)
        out[sample, :, grid.start : grid.stop] = torch.einsum("ik,nkjd->nijd", rows, image).flatten(1, 2)
    return out


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigma: object,
    *,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
    boundary: str = "reflect",
) -> torch.Tensor:
    """Compute blurred attention in plain PyTorch, with every step at the input's dtype."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = plain_blur(query, grid, sigma, boundary) @ key.transpose(-2, -1) * scale
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -math.inf)
        else:
            logits = logits + attn_mask.to(logits.dtype)
    return torch.softmax(logits, dim=-1).nan_to_num(nan=0.0) @ value


def plain_mass(query: torch.Tensor, key: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Compute masses of keys in plain PyTorch, with every step at the input's dtype."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(query @ key.transpose(-2, -1) * scale, dim=-1).sum(dim=-2)


def oracle_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: Grid, sigma: object, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp of the reference in float64."""
    mask = options.get("attn_mask")
    if isinstance(mask, torch.Tensor) and mask.dtype != torch.bool:
        options["attn_mask"] = mask.double()
    return reference.seg_attention(
        query.double(), key.double(), value.double(), grid, sigma, return_lse=True, **options
    )


LAYOUTS = ("contiguous", "tokens_first", "packed", "reversed_heads", "transposed_dim", "offset")


def draw(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "contiguous",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return normal values ``[batch, heads, tokens, dim]`` in one of several memory layouts."""
    batch, heads, tokens, dim = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device=device, dtype=dtype)

    if layout == "contiguous":
        return normal(*shape)
    if layout == "tokens_first":  # the layout of projections, [batch, tokens, heads * dim]
        return normal(batch, tokens, heads * dim).unflatten(2, (heads, dim)).transpose(1, 2)
    if layout == "packed":  # the middle third of fused projections
        return normal(batch, tokens, 3 * heads * dim).chunk(3, dim=2)[1].unflatten(2, (heads, dim)).transpose(1, 2)
    if layout == "reversed_heads":  # memory order: tokens, batch, heads, dim
        return normal(tokens, batch, heads, dim).permute(1, 2, 0, 3)
    if layout == "transposed_dim":  # channels are not contiguous
        return normal(batch, heads, dim, tokens).transpose(2, 3)
    if layout == "offset":  # neither aligned nor dense
        return normal(batch, heads, tokens, dim + 3)[..., 1 : dim + 1]
    raise AssertionError(layout)
