# SPDX-License-Identifier: Apache-2.0
"""Shared code of the operators ``segkern::*``: their declaration, the memory layout of results, checks of the grid.

The operators are opaque to tracers. They choose the backend and make blur tables when they run, never in a graph.
Results are stored as ``[batch, tokens, heads, dim]``, like the results of PyTorch's attention, and viewed as
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

# For operators whose sigmas are a CPU tensor: a CUDA graph would replay with the sigmas of the capture.
host_reading_operator = partial(operator, tags=(torch.Tag.cudagraph_unsafe,))


def materialised(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy of a lazily negated view, because kernels read memory directly."""
    return x.resolve_neg() if x.is_neg() else x


def gradients_of(
    output: torch.Tensor, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Return gradients that can be differentiated again, and None for inputs that require no gradient."""
    wanted = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return tuple([next(grads) if x.requires_grad else None for x in inputs])


def owned(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the same memory that is not a view, because autograd restricts in-place changes of views."""
    return x.new_empty(0).set_(x)  # type: ignore[call-overload]


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous ``[batch, tokens, heads, dim]`` seen as ``[batch, heads, tokens, dim]``, not as a view."""
    return owned(x.transpose(1, 2).contiguous().transpose(1, 2))


def empty_output(query: torch.Tensor, value_dim: int) -> torch.Tensor:
    """Return an empty ``[batch, heads, tokens, value_dim]`` in the layout of :func:`tokens_first`."""
    shape = *query.shape[:3], value_dim
    return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=query.dtype, device=query.device)


def check_call(
    x: torch.Tensor, height: int, width: int, start: int, sigma: Sequence[float], boundary: str
) -> tuple[Grid, tuple[float, ...]]:
    """Return the grid and one sigma per sample for ``x``, from one sigma for all samples or one per sample.

    The public functions also check, but a caller can call operators directly, or replay graphs, without these
    functions.
    """
    check_no_forward_mode()
    grid = Grid(height, width, start)
    grid.check(x.shape[2])
    check_boundary(boundary)
    return grid, check_sigma(for_batch(sigma, x.shape[0]), x.shape[0])


def save_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Save the arguments of ``f(x, *arguments, adjoint)``, whose gradient is ``f(grad, *arguments, not adjoint)``."""
    ctx.arguments, ctx.adjoint = inputs[1:-1], inputs[-1]
