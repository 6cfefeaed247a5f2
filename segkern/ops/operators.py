# SPDX-License-Identifier: Apache-2.0
"""Shared by the operators ``segkern::*``: how they are declared, how results lie in memory, checks of the grid.

They are opaque to tracers: the backend is chosen and blur tables are made when they run, never in a graph.
Results are laid out ``[batch, tokens, heads, dim]`` in memory, as PyTorch's attention does, and seen as
``[batch, heads, tokens, dim]``. Gradients are compositions of PyTorch operations on the saved inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from segkern.core.gaussian import check_boundary
from segkern.core.sigmas import check_sigma, for_batch
from segkern.core.tracing import check_no_forward_mode
from segkern.grid import Grid

operator = partial(torch.library.custom_op, mutates_args=())

# For those whose sigmas are a tensor on the CPU: a CUDA graph would replay with the sigmas it was captured with.
host_reading_operator = partial(operator, tags=(torch.Tag.cudagraph_unsafe,))


def materialised(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of a view that PyTorch negates when it reads it: kernels read memory by address."""
    return x.resolve_neg() if x.is_neg() else x


def gradients_of(
    output: torch.Tensor, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gradients that can be differentiated again, None for inputs without one."""
    wanted = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return tuple([next(grads) if x.requires_grad else None for x in inputs])


def owned(x: torch.Tensor) -> torch.Tensor:
    """The same values and memory in a tensor that is no view, which autograd would not let be changed in place."""
    return x.new_empty(0).set_(x)  # type: ignore[call-overload]


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """The same values laid out ``[batch, tokens, heads, dim]``, seen as ``[batch, heads, tokens, dim]``; no view."""
    return owned(x.transpose(1, 2).contiguous().transpose(1, 2))


def empty_output(query: torch.Tensor, value_dim: int) -> torch.Tensor:
    """``[batch, heads, tokens, value_dim]`` in that layout."""
    shape = *query.shape[:3], value_dim
    return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=query.dtype, device=query.device)


def check_call(
    x: torch.Tensor, height: int, width: int, start: int, sigma: Sequence[float], boundary: str
) -> tuple[Grid, tuple[float, ...]]:
    """Grid and one sigma per sample that fit ``x``, from one sigma for all or one each.

    Operators can be called, and graphs replayed, around the public functions, so they check again.
    """
    check_no_forward_mode()
    grid = Grid(height, width, start)
    grid.check(x.shape[2])
    check_boundary(boundary)
    return grid, check_sigma(for_batch(sigma, x.shape[0]), x.shape[0])


def save_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Save the arguments of ``f(x, *arguments, adjoint)``, whose gradient is ``f(grad, *arguments, not adjoint)``."""
    ctx.arguments, ctx.adjoint = inputs[1:-1], inputs[-1]
