# SPDX-License-Identifier: Apache-2.0
"""A sigma for each head: heads that agree are served by one call, on views of the tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from segkern.core.gaussian import runs


def by_head(
    call: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    sigmas: tuple[tuple[float, ...], ...],
    mask: torch.Tensor | None = None,
) -> Any:
    """What ``call`` gives, run after run of heads with the same sigmas, joined again.

    Args:
        call: takes tensors of some heads, ``sigma``, a tuple of one per sample, and ``attn_mask`` where there is one.
        tensors: ``[batch, heads, ...]``.
        sigmas: ``[batch][heads]``.
        mask: ``[1 or batch, 1 or heads, ...]``.
    """
    columns = list(zip(*sigmas, strict=True)) or [(0.0,) * len(sigmas)]  # no heads at all are a run of none
    found = []
    for heads, sigma in runs(columns):
        options = {} if mask is None else {"attn_mask": mask if mask.shape[1] == 1 else mask[:, heads]}
        found.append(call(*(x[:, heads] for x in tensors), sigma=sigma, **options))
    if isinstance(found[0], tuple):
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return torch.cat(found, dim=1)
