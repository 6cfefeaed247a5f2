# SPDX-License-Identifier: Apache-2.0
"""Compositions of emoji drawings with captions: one drawing or two on a plain background.

Every composition is determined by a seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image

from studies.drawings.sheet import drawings, sprite, trained

BACKGROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 240, 170),
    "pink": (255, 208, 220),
    "blue": (196, 224, 255),
    "green": (206, 240, 200),
    "purple": (226, 208, 250),
    "orange": (255, 214, 170),
    "gray": (214, 216, 220),
}
LAYOUTS = ("single", "beside", "above")
# Width and height in pixels of the sizes that the model is trained at. Only the last two have room for two drawings.
PICTURE_SIZES = ((64, 64), (96, 64), (64, 96))
# Indices into PICTURE_SIZES in the order in which the compositions of a series and training batches use them.
TURNS = (0, 0, 0, 1, 0, 0, 0, 2)

_SINGLE_SHARE = 0.4  # of the compositions that are not square
_BACKGROUND_SHARE = 0.5  # of the captions that name the background
_SCALES = (0.76, 0.96)  # of the largest scale at which the drawing fits


@cache
def attributes() -> dict[str, tuple[str, ...]]:
    """Return the questions that can be asked about a composition with their possible answers."""
    names = tuple(drawings())
    return {
        "layout": LAYOUTS,
        "drawing": names,
        "second drawing": (*names, "none"),
        "background": tuple(BACKGROUNDS),
    }


@dataclass(frozen=True)
class Scene:
    """The content of a composition.

    Attributes:
        layout: One of ``LAYOUTS``.
        names: Name of the drawing, or of the left and the right or the upper and the lower drawing.
        background: One of ``BACKGROUNDS``.
        caption: The scene in words.
    """

    layout: str
    names: tuple[str, ...]
    background: str
    caption: str

    def answers(self) -> dict[str, str]:
        """Return the answer to each question of ``attributes``."""
        first, second = (*self.names, "none")[:2]
        return {"layout": self.layout, "drawing": first, "second drawing": second, "background": self.background}

    def labels(self) -> list[int]:
        """Return the index of each answer among the possible answers, in the order of ``attributes``."""
        answers = self.answers()
        return [known.index(answers[question]) for question, known in attributes().items()]

    @property
    def names_background(self) -> bool:
        """True if the caption names the background."""
        return self.caption.endswith("background")


def random_scene(rng: random.Random, width: int, height: int, names: Sequence[str] | None = None) -> Scene:
    """Return a random scene for an image of this size.

    Args:
        rng: Source of randomness.
        width: Width in pixels.
        height: Height in pixels.
        names: Names to choose from. The default is the names of all drawings that the model is trained on.

    Example:
        >>> random_scene(random.Random(3), 96, 64, ("fox", "owl")).caption
        'fox and owl'
    """
    names = names or trained()
    background = rng.choice(list(BACKGROUNDS))
    layout = "single"
    if width != height and rng.random() >= _SINGLE_SHARE:
        layout = "beside" if width > height else "above"
    chosen = tuple(rng.choice(names) for _ in range(1 if layout == "single" else 2))
    caption = (" and " if layout == "beside" else " above ").join(chosen)
    if rng.random() < _BACKGROUND_SHARE:
        article = "an" if background == "orange" else "a"
        caption += f" on {article} {background} background"
    return Scene(layout, chosen, background, caption)


def draw(scene: Scene, width: int, height: int, rng: random.Random) -> torch.Tensor:
    """Return an image of a scene. Direction, scale and position of the drawings depend on ``rng``.

    Args:
        scene: Scene to draw.
        width: Width in pixels, at least 64.
        height: Height in pixels, at least 64.
        rng: Source of randomness.

    Returns:
        uint8 tensor ``[3, height, width]``.

    Raises:
        ValueError: If the image is smaller than 64x64 pixels.
    """
    if width < 64 or height < 64:
        raise ValueError(f"images of drawings have at least 64x64 pixels, got {width}x{height}")
    image = Image.new("RGB", (width, height), BACKGROUNDS[scene.background])
    for name, box in zip(scene.names, _boxes(scene.layout, width, height, rng), strict=True):
        _paste(image, name, box, rng)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).permute(2, 0, 1).contiguous()


def numbered(
    seed: int | str, index: int, size: tuple[int, int] | None = None, names: Sequence[str] | None = None
) -> tuple[Scene, torch.Tensor]:
    """Return one composition of an endless series: its scene and its image.

    Args:
        seed: Seed of the series.
        index: Index in the series.
        size: Width and height in pixels. By default, the sizes follow ``TURNS``.
        names: Names to choose from, see ``random_scene``.

    Returns:
        The scene, and its image as a uint8 tensor ``[3, height, width]``.
    """
    rng = random.Random(f"{seed}/{index}")
    width, height = size or PICTURE_SIZES[TURNS[index % len(TURNS)]]
    scene = random_scene(rng, width, height, names)
    return scene, draw(scene, width, height, rng)


def _boxes(layout: str, width: int, height: int, rng: random.Random) -> list[tuple[int, int, int, int]]:
    """Return left, top, width and height of the area of each drawing."""
    if layout == "beside":
        return [(0, 0, width // 2, height), (width // 2, 0, width // 2, height)]
    if layout == "above":
        return [(0, 0, width, height // 2), (0, height // 2, width, height // 2)]
    side = min(width, height)
    return [(rng.randint(0, width - side), rng.randint(0, height - side), side, side)]


def _paste(image: Image.Image, name: str, box: tuple[int, int, int, int], rng: random.Random) -> None:
    left, top, width, height = box
    drawing = sprite(name)
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(*_SCALES) * min(width / drawing.width, height / drawing.height)
    size = (max(4, round(drawing.width * scale)), max(4, round(drawing.height * scale)))
    drawing = drawing.resize(size, Image.Resampling.LANCZOS)  # Pillow premultiplies alpha
    left += round((width - size[0]) * rng.random())
    top += round((height - size[1]) * rng.random())
    image.paste(drawing, (left, top), drawing)
