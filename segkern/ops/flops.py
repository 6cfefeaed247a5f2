# SPDX-License-Identifier: Apache-2.0
"""What the operators cost: import this module before making a ``torch.utils.flop_counter.FlopCounterMode``.

PyTorch's counter knows its own operations; of ours it knows after the import. Importing segkern does not do it, since
the counter imports Triton.

Counted is what our kernels do: one query row for the image of a sample of infinite sigma, products with one matrix per
axis for a finite blur, scores twice for masses. Gradients are compositions in PyTorch that compute the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from segkern.core.coarse_queries import coarse_grid
from segkern.grid import Grid
from segkern.ops import attention, masses  # noqa: F401  their operators are defined there
from segkern.ops import coarse as coarse_ops  # noqa: F401

Shape = Sequence[int]


def _blur(shape: Shape, height: int, width: int, sigma: Sequence[float]) -> int:
    """One product per axis for each sample of finite sigma."""
    _, heads, _, dim = shape
    blurred = sum(0.0 < s < math.inf for s in sigma)
    return 2 * blurred * heads * dim * height * width * (height + width)


@register_flop_formula(torch.ops.segkern.gaussian_blur)
def gaussian_blur_flop(
    x: Shape, height: int, width: int, start: int, sigma: Sequence[float], *args: Any, **kwargs: Any
) -> int:
    """``segkern::gaussian_blur``."""
    return _blur(x, height, width, sigma)


@register_flop_formula(torch.ops.segkern.seg_attention)
def seg_attention_flop(
    query: Shape,
    key: Shape,
    value: Shape,
    attn_mask: Shape | None,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    *args: Any,
    **kwargs: Any,
) -> int:
    """``segkern::seg_attention``; equal queries have unequal rows only under a mask with rows of its own."""
    _, heads, tokens, dim = query
    one_row = attn_mask is None or attn_mask[2] == 1
    rows = sum(tokens - height * width + 1 if one_row and math.isinf(s) else tokens for s in sigma)
    return 2 * heads * rows * key[2] * (dim + value[3]) + _blur(query, height, width, sigma)


@register_flop_formula(torch.ops.segkern.seg_attention_at)
def seg_attention_at_flop(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """``segkern::seg_attention_at``: its sigmas are not known beforehand, so every row counts, and no blur."""
    batch, heads, tokens, dim = query
    return 2 * batch * heads * tokens * key[2] * (dim + value[3])


@register_flop_formula(torch.ops.segkern.attention_mass)
def attention_mass_flop(query: Shape, key: Shape, *args: Any, **kwargs: Any) -> int:
    """``segkern::attention_mass``: scores for the rows' sums and again for the keys', as the kernels do."""
    batch, heads, tokens, dim = query
    return 2 * 2 * batch * heads * tokens * key[2] * dim


@register_flop_formula(torch.ops.segkern.attention_energy)
def attention_energy_flop(
    query: Shape, key: Shape, height: int, width: int, start: int, sigma: Sequence[float], *args: Any, **kwargs: Any
) -> int:
    """``segkern::attention_energy``: the scores once, of one row for the image of a sample of infinite sigma."""
    _, heads, tokens, dim = query
    rows = sum(tokens - height * width + 1 if math.isinf(s) else tokens for s in sigma)
    return 2 * heads * rows * key[2] * dim + _blur(query, height, width, sigma)


@register_flop_formula(torch.ops.segkern.attention_mass_backward)
def attention_mass_backward_flop(grad: Shape, query: Shape, key: Shape, *args: Any, **kwargs: Any) -> int:
    """Scores again, and from those of them the gradients of queries and keys."""
    batch, heads, tokens, dim = query
    return 3 * 2 * batch * heads * tokens * key[2] * dim


@register_flop_formula(torch.ops.segkern.attention_energy_backward)
def attention_energy_backward_flop(
    grad: Shape,
    query: Shape,
    key: Shape,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    *args: Any,
    **kwargs: Any,
) -> int:
    """The same of every row, and the blur there and back."""
    return attention_mass_backward_flop(grad, query, key) + 2 * _blur(query, height, width, sigma)


@register_flop_formula(torch.ops.segkern.coarse_queries)
def coarse_queries_flop(
    x: Shape,
    height: int,
    width: int,
    start: int,
    sigma: Sequence[float],
    stride: Sequence[int],
    boundary: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    """``segkern::coarse_queries``."""
    coarse = coarse_grid(Grid(height, width), (stride[0], stride[1]), boundary)
    return _resample(x, Grid(height, width), coarse)


@register_flop_formula(torch.ops.segkern.coarse_outputs)
def coarse_outputs_flop(
    x: Shape, height: int, width: int, start: int, stride: Sequence[int], boundary: str, *args: Any, **kwargs: Any
) -> int:
    """``segkern::coarse_outputs``."""
    coarse = coarse_grid(Grid(height, width), (stride[0], stride[1]), boundary)
    return _resample(x, coarse, Grid(height, width))


def _resample(x: Shape, old: Grid, new: Grid) -> int:
    """From one grid to another: over the width at all old rows, then over the height at all new columns."""
    batch, heads, _, dim = x
    return 2 * batch * heads * dim * new.width * old.height * (old.width + new.height)
