# SPDX-License-Identifier: Apache-2.0
"""FLOP formulas of the operators. Import this module before making a ``torch.utils.flop_counter.FlopCounterMode``.

PyTorch's counter counts segkern's operators only after this import. Importing segkern does not import this module,
because the counter imports Triton.

The formulas count the work of our kernels: one query row for the image of a sample with infinite sigma, a product with
one matrix per axis for a finite blur, and the scores twice for masses. Gradients are compositions in PyTorch that
compute the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from segkern.core.sigmas import is_finite_blur
from segkern.ops import attention, masses  # noqa: F401  defines the operators

Shape = Sequence[int]


def _blur(shape: Shape, height: int, width: int, sigma: Sequence[float]) -> int:
    """Return the FLOPs of the blur: one product per axis for each sample with a finite sigma."""
    _, heads, _, dim = shape
    return 2 * sum(map(is_finite_blur, sigma)) * heads * dim * height * width * (height + width)


def _rows(tokens: int, height: int, width: int, sigma: Sequence[float]) -> int:
    """Return the query rows of a head over all samples. The image of a sample with infinite sigma is one row."""
    return sum(tokens - height * width + 1 if math.isinf(s) else tokens for s in sigma)


@register_flop_formula(torch.ops.segkern.gaussian_blur)
def gaussian_blur_flop(
    x: Shape, height: int, width: int, start: int, sigma: Sequence[float], *_: Any, **__: Any
) -> int:
    """Return the FLOPs of ``segkern::gaussian_blur``."""
    return _blur(x, height, width, sigma)


@register_flop_formula(torch.ops.segkern.seg_attention)
def seg_attention_flop(
    query: Shape, key: Shape, value: Shape, attn_mask: Shape | None, *arguments: Any, **_: Any
) -> int:
    """Return the FLOPs of ``segkern::seg_attention``. Under a mask with one row per query, all rows are computed."""
    height, width, _start, sigma = arguments[:4]
    batch, heads, tokens, dim = query
    one_row = attn_mask is None or attn_mask[2] == 1
    rows = _rows(tokens, height, width, sigma) if one_row else batch * tokens
    return 2 * heads * rows * key[2] * (dim + value[3]) + _blur(query, height, width, sigma)


@register_flop_formula(torch.ops.segkern.seg_attention_at)
def seg_attention_at_flop(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of ``segkern::seg_attention_at``: all rows and no blur, because the sigmas are not yet known."""
    batch, heads, tokens, dim = query
    return 2 * batch * heads * tokens * key[2] * (dim + value[3])


@register_flop_formula(torch.ops.segkern.attention_mass)
def attention_mass_flop(query: Shape, key: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of ``segkern::attention_mass``: the scores, for the row sums and again for the key sums."""
    batch, heads, tokens, dim = query
    return 2 * 2 * batch * heads * tokens * key[2] * dim


@register_flop_formula(torch.ops.segkern.attention_energy)
def attention_energy_flop(query: Shape, key: Shape, *arguments: Any, **__: Any) -> int:
    """Return the FLOPs of ``segkern::attention_energy``: the scores, with one row for an image at infinite sigma."""
    height, width, _start, sigma = arguments[:4]
    _, heads, tokens, dim = query
    return 2 * heads * _rows(tokens, height, width, sigma) * key[2] * dim + _blur(query, height, width, sigma)


@register_flop_formula(torch.ops.segkern.attention_mass_backward)
def attention_mass_backward_flop(grad: Shape, query: Shape, key: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the scores again, and of the gradients of queries and keys."""
    batch, heads, tokens, dim = query
    return 3 * 2 * batch * heads * tokens * key[2] * dim


@register_flop_formula(torch.ops.segkern.attention_energy_backward)
def attention_energy_backward_flop(grad: Shape, query: Shape, key: Shape, *arguments: Any, **_: Any) -> int:
    """Return the FLOPs of the gradients of every row, and of the blur forward and backward."""
    height, width, _start, sigma = arguments[:4]
    return attention_mass_backward_flop(grad, query, key) + 2 * _blur(query, height, width, sigma)
