# SPDX-License-Identifier: Apache-2.0
"""The drawings that everything here is trained on, drawn once and kept in a file."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from studies.evaluation.shapes import PICTURE_SIZES, Scene, Thing, numbered
from studies.training.loop import save

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


def _one(index: int) -> tuple[Scene, np.ndarray]:
    torch.set_num_threads(1)
    scene, picture = numbered(SEED, index)
    return scene, picture.numpy()  # a tensor would travel between processes as an open file


def drawings(work: Path, count: int = COUNT) -> Drawings:
    """The first ``count`` drawings of the training series, from ``work`` if they lie there already."""
    sizes = "-".join(f"{width}x{height}" for width, height in PICTURE_SIZES)
    path = work / f"drawings-{count}-{sizes}.pt"
    if not path.exists():
        pictures: dict[Size, list[torch.Tensor]] = {size: [] for size in PICTURE_SIZES}
        scenes: dict[Size, list[Scene]] = {size: [] for size in PICTURE_SIZES}
        with Pool() as pool:
            found = pool.imap(_one, range(count), chunksize=64)
            for scene, picture in track(found, "drawing", total=count):
                size = (picture.shape[2], picture.shape[1])
                pictures[size].append(torch.from_numpy(picture))
                scenes[size].append(scene)
        work.mkdir(parents=True, exist_ok=True)
        stacked = {size: torch.stack(group) for size, group in pictures.items()}
        save({"pictures": stacked, "scenes": scenes}, path)
    with torch.serialization.safe_globals([Scene, Thing]):
        return Drawings(**torch.load(path, weights_only=True))


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 levels as float32 between -1 and 1."""
    return pictures.float() / 127.5 - 1
