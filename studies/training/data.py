# SPDX-License-Identifier: Apache-2.0
"""The drawings that everything here is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from rich.progress import track

from studies.evaluation.shapes import PICTURE_SIZES, Scene, numbered

SEED = 20261123
COUNT = 32_000

Size = tuple[int, int]


@dataclass
class Drawings:
    """Pictures by their size, and what they show.

    Attributes:
        pictures: uint8 ``[count, 3, height, width]`` by (width, height).
        scenes: by (width, height), in the order of the pictures.
    """

    pictures: dict[Size, torch.Tensor]
    scenes: dict[Size, list[Scene]]


@cache
def drawings(count: int = COUNT) -> Drawings:
    """The first ``count`` drawings of the training series, made in a minute or two and kept in memory."""
    pictures: dict[Size, list[torch.Tensor]] = {size: [] for size in PICTURE_SIZES}
    scenes: dict[Size, list[Scene]] = {size: [] for size in PICTURE_SIZES}
    for index in track(range(count), "drawing"):
        scene, picture = numbered(SEED, index)
        size = (picture.shape[2], picture.shape[1])
        pictures[size].append(picture)
        scenes[size].append(scene)
    return Drawings({size: torch.stack(group) for size, group in pictures.items()}, scenes)


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 levels as float32 between -1 and 1."""
    return pictures.float() / 127.5 - 1


def in_turn(sizes: tuple[Size, ...] = PICTURE_SIZES) -> list[Size]:
    """Sizes in the order in which steps take them, the square one twice as often."""
    square, *others = sizes
    return [size for other in others for size in (square, other)]
