# SPDX-License-Identifier: Apache-2.0
"""Drawings of simple shapes with captions: what the bundled model is trained on and measured against.

A drawing shows one object, two objects that stand in a relation, or one object repeated in a row, a column or a circle,
on a dark or a light gradient. Everything follows from a seed.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

SHAPES = ("circle", "ring", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 128, 30),
    "yellow": (248, 214, 50),
    "green": (48, 160, 78),
    "blue": (44, 96, 214),
    "purple": (142, 66, 190),
}
SIZES = ("small", "large")
BACKGROUNDS = ("dark", "light")
LAYOUTS = ("single", "vertical", "horizontal", "overlap", "row", "column", "circle")
PAIRS = ("vertical", "horizontal", "overlap")

# What can be asked about a drawing, and the answers; "none" is for what a scene does not have or its layout sets.
ATTRIBUTES = {
    "layout": LAYOUTS,
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": (*SIZES, "none"),
    "second shape": (*SHAPES, "none"),
    "second colour": (*COLOURS, "none"),
    "second size": (*SIZES, "none"),
    "background": BACKGROUNDS,
}

# Width and height in pixels of the sizes that the model is trained at.
PICTURE_SIZES = ((64, 64), (96, 64), (64, 96))

_LAYOUT_WEIGHTS = (25, 15, 15, 15, 10, 10, 10)
_RADII = {"small": (0.13, 0.15), "large": (0.215, 0.24)}  # of the shorter side
_REPEATED_RADII = {"row": (0.13, 0.145), "column": (0.13, 0.145), "circle": (0.105, 0.115)}
_IN_CIRCLE = 6
_TILT = math.radians(8)


@dataclass(frozen=True)
class Thing:
    """One kind of object: what a caption says of it.

    Attributes:
        shape: one of ``SHAPES``.
        colour: one of ``COLOURS``.
        size: one of ``SIZES``; None where the layout sets it.
    """

    shape: str
    colour: str
    size: str | None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """The content of a drawing.

    Attributes:
        layout: one of ``LAYOUTS``.
        things: the objects, the upper, left or front one of a pair first; one for every other layout.
        background: one of ``BACKGROUNDS``.
        caption: the scene in words.
    """

    layout: str
    things: tuple[Thing, ...]
    background: str
    caption: str

    def answers(self) -> dict[str, str]:
        """The answer to each of ``ATTRIBUTES``."""
        first, second = self.things[0], self.things[1] if len(self.things) > 1 else Thing("none", "none", None)
        return {
            "layout": self.layout,
            "shape": first.shape,
            "colour": first.colour,
            "size": first.size or "none",
            "second shape": second.shape,
            "second colour": second.colour,
            "second size": second.size or "none",
            "background": self.background,
        }

    def labels(self) -> list[int]:
        """The place of each answer in ``ATTRIBUTES``, in their order."""
        answers = self.answers()
        return [known.index(answers[name]) for name, known in ATTRIBUTES.items()]

    @property
    def names_background(self) -> bool:
        """True if the caption names the background; everything else it always names."""
        return self.caption.endswith("background")


@dataclass(frozen=True)
class _Mark:
    shape: str
    colour: tuple[float, float, float]
    x: float
    y: float
    radius: float
    tilt: float


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn at random, with its caption.

    Example:
        >>> random_scene(random.Random(4)).caption
        'a large purple triangle on a dark background'
    """
    layout = rng.choices(LAYOUTS, _LAYOUT_WEIGHTS)[0]
    background = rng.choice(BACKGROUNDS)
    sized = layout == "single" or layout in PAIRS
    count = 2 if layout in PAIRS else 1
    colours = rng.sample(list(COLOURS), count)  # the objects of a pair differ in colour, so that an overlap shows
    things = tuple(Thing(rng.choice(SHAPES), colour, rng.choice(SIZES) if sized else None) for colour in colours)
    caption = _phrase(rng, layout, things)
    if rng.random() < 0.5:
        caption += f" on a {background} background"
    return Scene(layout, things, background, caption)


def draw(scene: Scene, width: int, height: int, rng: random.Random) -> torch.Tensor:
    """The scene as a picture; position, exact size, tilt and hues vary with ``rng``.

    Args:
        scene: what to show.
        width: pixels, 64 or more.
        height: pixels, 64 or more.
        rng: source of everything that the scene leaves open.

    Returns:
        uint8 ``[3, height, width]``.

    Raises:
        ValueError: for a picture too small to draw on.
    """
    if width < 64 or height < 64:
        raise ValueError(f"drawings are 64x64 pixels or more, got {width}x{height}")
    picture = _gradient(scene.background, width, height, rng)
    for mark in reversed(_place(scene, width, height, rng)):  # the first is in front
        _paint(picture, mark)
    return picture.round_().clamp_(0, 255).to(torch.uint8)


def numbered(seed: int, index: int, size: tuple[int, int] | None = None) -> tuple[Scene, torch.Tensor]:
    """Drawing number ``index`` of the endless series that ``seed`` names: its scene and its picture.

    Args:
        seed: of the series.
        index: in the series.
        size: width and height in pixels; ``PICTURE_SIZES`` in turn, the square one twice as often, if not given.

    Returns:
        The scene, and uint8 ``[3, height, width]``.
    """
    rng = random.Random(f"{seed}/{index}")
    scene = random_scene(rng)
    width, height = size or PICTURE_SIZES[(0, 1, 0, 2)[index % 4]]
    return scene, draw(scene, width, height, rng)


def _phrase(rng: random.Random, layout: str, things: tuple[Thing, ...]) -> str:
    thing = things[0]
    if layout == "single":
        return _a(thing)
    if layout in ("row", "column"):
        return f"a {layout} of three {thing.colour} {_plural(thing.shape)}"
    if layout == "circle":
        return f"six {thing.colour} {_plural(thing.shape)} in a circle"
    words = {
        "vertical": ("above", "below"),
        "horizontal": ("left of", "right of"),
        "overlap": ("in front of", "behind"),
    }[layout]
    if rng.random() < 0.5:
        return f"{_a(things[0])} {words[0]} {_a(things[1])}"
    return f"{_a(things[1])} {words[1]} {_a(things[0])}"


def _a(thing: Thing) -> str:
    return f"a {thing}"


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _gradient(background: str, width: int, height: int, rng: random.Random) -> torch.Tensor:
    """float32 ``[3, height, width]``: a linear gradient between two tints, levels of 0 to 255."""
    low, high = (12, 70) if background == "dark" else (176, 244)
    first, second = ([rng.uniform(low, high) for _ in range(3)] for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    x = torch.linspace(-1, 1, width) * math.cos(angle)
    y = torch.linspace(-1, 1, height) * math.sin(angle)
    share = (x[None, :] + y[:, None]) / (abs(math.cos(angle)) + abs(math.sin(angle))) / 2 + 0.5
    return torch.tensor(first)[:, None, None] * (1 - share) + torch.tensor(second)[:, None, None] * share


def _place(scene: Scene, width: int, height: int, rng: random.Random) -> list[_Mark]:
    """The objects with their places, front first."""
    unit = min(width, height)

    def mark(thing: Thing, x: float, y: float, radius: float, tilt: float, colour: tuple[float, ...]) -> _Mark:
        red, green, blue = colour
        x = min(max(x, radius + 2), width - radius - 2)
        y = min(max(y, radius + 2), height - radius - 2)
        return _Mark(thing.shape, (red, green, blue), x, y, radius, tilt)

    def hue(thing: Thing) -> tuple[float, ...]:
        return tuple(level + rng.uniform(-10, 10) for level in COLOURS[thing.colour])

    def tilt() -> float:
        return rng.uniform(-_TILT, _TILT)

    if scene.layout in _REPEATED_RADII:
        (thing,) = scene.things
        radius = rng.uniform(*_REPEATED_RADII[scene.layout]) * unit
        colour, same_tilt = hue(thing), tilt()
        return [mark(thing, x, y, radius, same_tilt, colour) for x, y in _repeated(scene.layout, width, height, rng)]

    radii = [rng.uniform(*_RADII[thing.size or "small"]) * unit for thing in scene.things]
    if scene.layout == "single":
        centres = [(rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height)]
    elif scene.layout == "vertical":
        xs = [rng.uniform(0.35, 0.65) * width for _ in range(2)]
        centres = [(xs[0], rng.uniform(0.22, 0.27) * height), (xs[1], rng.uniform(0.73, 0.78) * height)]
    elif scene.layout == "horizontal":
        ys = [rng.uniform(0.35, 0.65) * height for _ in range(2)]
        centres = [(rng.uniform(0.22, 0.27) * width, ys[0]), (rng.uniform(0.73, 0.78) * width, ys[1])]
    else:
        angle = rng.uniform(0, 2 * math.pi)
        apart = rng.uniform(0.55, 0.75) * max(radii) + 0.35 * min(radii)
        x, y = rng.uniform(0.42, 0.58) * width, rng.uniform(0.42, 0.58) * height
        step = apart / 2 * math.cos(angle), apart / 2 * math.sin(angle)
        centres = [(x - step[0], y - step[1]), (x + step[0], y + step[1])]
    placed = zip(scene.things, centres, radii, strict=True)
    return [mark(thing, x, y, radius, tilt(), hue(thing)) for thing, (x, y), radius in placed]


def _repeated(layout: str, width: int, height: int, rng: random.Random) -> list[tuple[float, float]]:
    across = rng.uniform(0.35, 0.65)
    spread = rng.uniform(0.3, 0.315)
    if layout == "row":
        return [((0.5 + spread * i) * width, across * height) for i in (-1, 0, 1)]
    if layout == "column":
        return [(across * width, (0.5 + spread * i) * height) for i in (-1, 0, 1)]
    reach = rng.uniform(0.32, 0.36) * min(width, height)
    turn = rng.uniform(0, 2 * math.pi)
    x, y = (0.5 + rng.uniform(-0.04, 0.04)) * width, (0.5 + rng.uniform(-0.04, 0.04)) * height
    angles = [turn + 2 * math.pi * i / _IN_CIRCLE for i in range(_IN_CIRCLE)]
    return [(x + reach * math.cos(angle), y + reach * math.sin(angle)) for angle in angles]


def _paint(picture: torch.Tensor, mark: _Mark) -> None:
    """Blend the mark over the picture; its coverage of a pixel is read from the distance to its outline."""
    reach = mark.radius * 1.25 + 2
    left, right = max(0, int(mark.x - reach)), min(picture.shape[2], int(mark.x + reach) + 2)
    top, bottom = max(0, int(mark.y - reach)), min(picture.shape[1], int(mark.y + reach) + 2)
    x = torch.arange(left, right, dtype=torch.float32) + 0.5 - mark.x
    y = torch.arange(top, bottom, dtype=torch.float32)[:, None] + 0.5 - mark.y
    cos, sin = math.cos(mark.tilt), math.sin(mark.tilt)
    cover = (0.5 - _distance(mark.shape, x * cos + y * sin, y * cos - x * sin, mark.radius)).clamp_(0, 1)
    region = picture[:, top:bottom, left:right]
    region += cover * (torch.tensor(mark.colour)[:, None, None] - region)


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Signed distance to the outline in pixels, negative inside; exact near the edges, which is where it counts."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.92 * radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.75 * radius).abs() - 0.25 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.8 * radius
    if shape == "cross":
        upright = torch.maximum(x.abs() - 0.3 * radius, y.abs() - radius)
        level = torch.maximum(x.abs() - radius, y.abs() - 0.3 * radius)
        return torch.minimum(upright, level)
    if shape == "triangle":
        sides = torch.maximum(x.abs() * math.cos(math.pi / 6) - y * 0.5, y)
        return sides - 0.55 * radius
    # A star of five points: fold the plane into half of one point, then it has a single straight edge.
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle + sector / 2).remainder(sector) - sector / 2
    length = torch.hypot(x, y)
    tip, dent = 1.05 * radius, 0.45 * radius
    along, beside = length * folded.cos(), length * folded.abs().sin()
    edge_x, edge_y = dent * math.cos(sector / 2) - tip, dent * math.sin(sector / 2)
    return ((along - tip) * -edge_y + beside * edge_x) / math.hypot(edge_x, edge_y) * -1
