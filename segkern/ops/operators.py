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
from segkern.core.sigmas import check_sigma
from segkern.grid import Grid

# Tables made inside an operator outlive it, which memory of a compiler's CUDA graph must not.
operator = partial(torch.library.custom_op, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """The same values laid out ``[batch, tokens, heads, dim]``, seen as ``[batch, heads, tokens, dim]``."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_output(query: torch.Tensor, value_dim: int, more_tokens: int = 0) -> torch.Tensor:
    """``[batch, heads, tokens + more_tokens, value_dim]`` in that layout."""
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens + more_tokens, heads, value_dim).transpose(1, 2)


def check_call(
    x: torch.Tensor, height: int, width: int, start: int, sigma: Sequence[float], boundary: str
) -> tuple[Grid, tuple[float, ...]]:
    """Grid and sigmas that fit ``x``; operators can be called, and graphs replayed, around the public functions."""
    grid = Grid(height, width, start)
    grid.check(x.shape[2])
    check_boundary(boundary)
    return grid, check_sigma(sigma, x.shape[0])


def save_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Save the arguments of ``f(x, *arguments, adjoint)``, whose gradient is ``f(grad, *arguments, not adjoint)``."""
    ctx.arguments, ctx.adjoint = inputs[1:-1], inputs[-1]
