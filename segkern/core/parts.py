# SPDX-License-Identifier: Apache-2.0
"""Calls on parts of tensors: heads that share their sigmas, and frames of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from segkern.core.sigmas import equal_runs, has_head_sigmas, is_sequence
from segkern.core.tracing import check_not_jit_traced, own_result
from segkern.grid import Grid


def call_by_head(
    call: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    sigmas: tuple[tuple[float, ...], ...],
    mask: torch.Tensor | None = None,
) -> Any:
    """Call ``call`` once for each run of heads with equal sigmas, and concatenate the results.

    Args:
        call: Function that takes views of some heads, ``sigma`` (one number or one per sample), and ``attn_mask`` if
            there is a mask.
        tensors: Tensors ``[batch, heads, ...]``.
        sigmas: Sigmas ``[1 or batch][heads]``.
        mask: Mask ``[1 or batch, 1 or heads, ...]``.
    """
    check_not_jit_traced("one sigma per head")
    columns = list(zip(*sigmas, strict=True)) or [(0.0,) * len(sigmas)]  # without heads, one empty run
    results = []
    for heads, column in equal_runs(columns):
        sigma = column[0] if len(column) == 1 else column
        options = {} if mask is None else {"attn_mask": mask if mask.shape[1] == 1 else mask[:, heads]}
        results.append(call(*(x[:, heads] for x in tensors), sigma=sigma, **options))
    if isinstance(results[0], tuple):
        return tuple(torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
    return torch.cat(results, dim=1)


def blur_by_frame(
    blur: Callable[..., torch.Tensor], x: torch.Tensor, grid: Grid, sigma: float | Iterable[float | Sequence[float]]
) -> torch.Tensor:
    """Call ``blur(x, grid, sigma)`` for each frame of a video, with the frames as additional heads.

    Args:
        blur: Function that takes ``[batch, heads, height * width, dim]``, a grid of one frame, and sigma.
        x: Tensor ``[batch, heads, tokens, dim]``.
        grid: Grid of the video.
        sigma: One number for all samples, or one entry per sample: a number or a sequence of one number per head.
    """
    check_not_jit_traced("a grid of frames")
    frames = x[:, :, grid.start : grid.stop].unflatten(2, (grid.frames, grid.height * grid.width))
    samples: Any = sigma
    if has_head_sigmas(samples):
        samples = [
            [head for head in sample for _ in range(grid.frames)] if is_sequence(sample) else sample
            for sample in samples
        ]
    blurred = blur(frames.flatten(1, 2), Grid(grid.height, grid.width), samples).view(frames.shape).flatten(2, 3)
    if grid.tokens == x.shape[2]:
        return own_result(blurred)
    return torch.cat([x[:, :, : grid.start], blurred, x[:, :, grid.stop :]], dim=2)
