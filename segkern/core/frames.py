# SPDX-License-Identifier: Apache-2.0
"""Videos: every frame is an image of its own, so its tokens are blurred like those of another head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from segkern.core.gaussian import is_by_head
from segkern.grid import Grid


def blur_frames(
    blur: Callable[..., torch.Tensor],
    x: torch.Tensor,
    grid: Grid,
    sigma: float | Iterable[float | Sequence[float]],
) -> torch.Tensor:
    """What ``blur(x, grid, sigma)`` gives for one image, for each frame of a video.

    Args:
        blur: takes ``[batch, heads, height * width, dim]``, a grid of one frame and sigma.
        x: ``[batch, heads, tokens, dim]``.
        grid: of the video.
        sigma: one number, or one per sample, or for a sample one per head.
    """
    image = x[:, :, grid.start : grid.stop]
    frames = image.unflatten(2, (grid.frames, grid.height * grid.width))
    given: Any = sigma
    if is_by_head(given):
        given = [_repeated(each, grid.frames) if hasattr(each, "__len__") else each for each in given]
    blurred = blur(frames.flatten(1, 2), Grid(grid.height, grid.width), given).view(frames.shape).flatten(2, 3)
    if grid.tokens == x.shape[2]:
        return blurred
    return torch.cat([x[:, :, : grid.start], blurred, x[:, :, grid.stop :]], dim=2)


def _repeated(heads: Sequence[float], count: int) -> list[float]:
    return [sigma for sigma in heads for _ in range(count)]
