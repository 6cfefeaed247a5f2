# SPDX-License-Identifier: Apache-2.0
"""The compositions of drawings that the bundled model is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from rich.progress import track

from studies.drawings.scenes import PICTURE_SIZES, TURNS, Scene, numbered

SEED = 20261130
COUNT = 40_000

Size = tuple[int, int]


@dataclass
class Compositions:
    """Images by their size, and their content.

    Attributes:
        pictures: uint8 tensors ``[count, 3, height, width]`` by (width, height).
        scenes: Scenes by (width, height), in the order of the images.
    """

    pictures: dict[Size, torch.Tensor]
    scenes: dict[Size, list[Scene]]


@cache
def compositions(count: int = COUNT) -> Compositions:
    """Return the first ``count`` compositions of the training series. They stay in memory."""
    pictures: dict[Size, list[torch.Tensor]] = {size: [] for size in PICTURE_SIZES}
    scenes: dict[Size, list[Scene]] = {size: [] for size in PICTURE_SIZES}
    for index in track(range(count), "drawing"):
        scene, picture = numbered(SEED, index)
        size = (picture.shape[2], picture.shape[1])
        pictures[size].append(picture)
        scenes[size].append(scene)
    return Compositions({size: torch.stack(group) for size, group in pictures.items()}, scenes)


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 levels as float32 between -1 and 1."""
    return pictures.float() / 127.5 - 1


def size_of_step(step: int) -> Size:
    """Return width and height of the images of a training step."""
    return PICTURE_SIZES[TURNS[step % len(TURNS)]]
