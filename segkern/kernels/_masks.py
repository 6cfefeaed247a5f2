# SPDX-License-Identifier: Apache-2.0
"""Attention masks in the form that kernels expect."""

from __future__ import annotations

from enum import IntEnum

import torch


class MaskKind(IntEnum):
    """The meaning of a mask's elements, as a constant for kernels."""

    NONE = 0
    ADDITIVE = 1
    BOOLEAN = 2


def mask_arguments(
    attn_mask: torch.Tensor | None, stand_in: torch.Tensor
) -> tuple[torch.Tensor, MaskKind, tuple[int, int, int, int]]:
    """Return pointer, kind and strides of a mask ``[batch, heads, tokens, keys]`` whose dimensions may be 1.

    Strides are 0 along broadcast dimensions. Without a mask, the pointer is ``stand_in``, which is not read.
    """
    if attn_mask is None:
        return stand_in, MaskKind.NONE, (0, 0, 0, 0)
    b, h, m, n = (0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True))
    if attn_mask.dtype == torch.bool:
        return attn_mask.view(torch.uint8), MaskKind.BOOLEAN, (b, h, m, n)
    return attn_mask, MaskKind.ADDITIVE, (b, h, m, n)
