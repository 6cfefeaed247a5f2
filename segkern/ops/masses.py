# SPDX-License-Identifier: Apache-2.0
"""The operators ``segkern::attention_mass`` and ``segkern::attention_energy``, and their backward operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkern.core.arguments import scale_of
from segkern.core.dispatch import choose_backend
from segkern.core.fallback import run_with_fallback
from segkern.core.precision import compute_dtype
from segkern.core.tracing import check_no_forward_mode
from segkern.grid import Grid
from segkern.ops import torch_masses
from segkern.ops.operators import check_call, gradients_of, materialised, operator


def fused_mass(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute masses with Triton kernels in a call without gradients or a tracer. Arguments are already checked."""
    from segkern.kernels.attention_mass import launch_attention_mass

    query, key = materialised(query), materialised(key)
    out = query.new_empty(key.shape[:3], dtype=torch.float32)
    launch_attention_mass(query, key, out, scale)
    return out


def fused_energy(
    query: torch.Tensor, key: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], scale: float, boundary: str
) -> torch.Tensor:
    """Compute energies with Triton kernels in a call without gradients or a tracer. Arguments are already checked."""
    from segkern.kernels.attention_energy import launch_attention_energy

    query, key = materialised(query), materialised(key)
    out = query.new_empty(query.shape[:3], dtype=torch.float32)
    launch_attention_energy(query, key, out, grid, sigmas, scale, boundary)
    return out


def run_mass(chosen: str, asked: str, *arguments: Any) -> torch.Tensor:
    """Compute masses with the chosen backend. ``arguments`` are passed to :func:`fused_mass`."""
    if chosen == "torch":
        return torch_masses.attention_mass(*arguments)
    return run_with_fallback("attention_mass", asked, fused_mass, torch_masses.attention_mass, *arguments)


def run_energy(chosen: str, asked: str, *arguments: Any) -> torch.Tensor:
    """Compute energies with the chosen backend. ``arguments`` are passed to :func:`fused_energy`."""
    if chosen == "torch":
        return torch_masses.attention_energy(*arguments)
    return run_with_fallback("attention_energy", asked, fused_energy, torch_masses.attention_energy, *arguments)


@operator("segkern::attention_mass")
def attention_mass(query: torch.Tensor, key: torch.Tensor, scale: float | None, backend: str) -> torch.Tensor:
    """See :func:`segkern.attention_mass`."""
    check_no_forward_mode()
    chosen, _ = choose_backend(query.device, query.dtype, query.shape[3], backend, operation="attention_mass")
    return run_mass(chosen, backend, query, key, scale_of(scale, query))


@attention_mass.register_fake
def _(query: torch.Tensor, key: torch.Tensor, scale: float | None, backend: str) -> torch.Tensor:
    return query.new_empty(key.shape[:3], dtype=compute_dtype(query.dtype))


@operator("segkern::attention_energy")
def attention_energy(
    query: torch.Tensor,
    key: torch.Tensor,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    scale: float | None,
    boundary: str,
    backend: str,
) -> torch.Tensor:
    """See :func:`segkern.attention_energy`."""
    grid, sigmas = check_call(query, height, width, start, sigma, boundary)
    chosen, _ = choose_backend(query.device, query.dtype, query.shape[3], backend, operation="attention_energy")
    return run_energy(chosen, backend, query, key, grid, sigmas, scale_of(scale, query), boundary)


@attention_energy.register_fake
def _(query: torch.Tensor, *arguments: object) -> torch.Tensor:
    return query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))


@operator("segkern::attention_mass_backward")
def attention_mass_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of query and key."""
    check_no_forward_mode()
    return torch_masses.attention_mass_backward(grad, query, key, scale_of(scale, query))


@operator("segkern::attention_energy_backward")
def attention_energy_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    scale: float | None,
    boundary: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of query and key."""
    grid, sigmas = check_call(query, height, width, start, sigma, boundary)
    scale = scale_of(scale, query)
    return torch_masses.attention_energy_backward(grad, query, key, grid, sigmas, scale, boundary)


@attention_mass_backward.register_fake
@attention_energy_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *arguments: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.arguments = inputs[2:-1]  # without the backend


def _mass_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key = ctx.saved_tensors
    (scale,) = ctx.arguments
    if torch.is_grad_enabled():  # the gradients are to be differentiated again
        mass = torch_masses.composed_mass(query, key, scale_of(scale, query))
        return *gradients_of(mass, (query, key), grad), None, None
    return *attention_mass_backward(grad, query, key, scale), None, None


def _energy_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key = ctx.saved_tensors
    if torch.is_grad_enabled():
        height, width, start, sigma, scale, boundary = ctx.arguments
        grid, sigmas = check_call(query, height, width, start, sigma, boundary)
        energy = torch_masses.composed_energy(query, key, grid, sigmas, scale_of(scale, query), boundary)
        return *gradients_of(energy, (query, key), grad), *(None,) * 7
    return *attention_energy_backward(grad, query, key, *ctx.arguments), *(None,) * 7


attention_mass.register_autograd(_mass_gradient, setup_context=_save_inputs)
attention_energy.register_autograd(_energy_gradient, setup_context=_save_inputs)
