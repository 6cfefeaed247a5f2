# SPDX-License-Identifier: Apache-2.0
"""Drawings show what their captions say, where they say it."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.evaluation import shapes
from studies.evaluation.shapes import ATTRIBUTES, COLOURS, PAIRS, PICTURE_SIZES, draw, numbered, random_scene

SEEDS = st.integers(0, 2**32)


def scene_of(layout: str, rng: random.Random) -> shapes.Scene:
    return next(scene for scene in iter(lambda: random_scene(rng), None) if scene.layout == layout)


def centre(picture: torch.Tensor, colour: str) -> tuple[float, float]:
    """Mean x and y, as shares of the picture, of the pixels within a colour's reach."""
    apart = (picture.float() - torch.tensor(COLOURS[colour], dtype=torch.float32)[:, None, None]).abs().amax(0)
    y, x = torch.nonzero(apart <= 11, as_tuple=True)
    assert len(x), f"nothing is {colour}"
    return float(x.float().mean() / picture.shape[2]), float(y.float().mean() / picture.shape[1])


def test_a_number_names_one_drawing() -> None:
    scene, picture = numbered(1, 3)
    again, same = numbered(1, 3)
    assert scene == again
    assert torch.equal(picture, same)
    assert not torch.equal(numbered(1, 7)[1], picture)
    assert {tuple(numbered(1, index)[1].shape[:0:-1]) for index in range(4)} == set(PICTURE_SIZES)


@settings(max_examples=50)
@given(SEEDS)
def test_captions_say_everything_in_order(seed: int) -> None:
    scene = random_scene(random.Random(seed))
    if scene.layout in PAIRS:
        before, after = (scene.caption.index(f"a {thing}") for thing in scene.things)
        first_named = any(word in scene.caption for word in ("above", "left of", "in front of"))
        assert (before < after) == first_named
        assert scene.things[0].colour != scene.things[1].colour
    else:
        (thing,) = scene.things
        assert thing.colour in scene.caption
        assert thing.shape in scene.caption
        assert (thing.size is not None) == (scene.layout == "single")
    assert scene.names_background == (f"{scene.background} background" in scene.caption)
    answers = [known[label] for label, known in zip(scene.labels(), ATTRIBUTES.values(), strict=True)]
    assert answers == list(scene.answers().values())


@settings(max_examples=30)
@given(SEEDS, st.sampled_from(PICTURE_SIZES), st.sampled_from(["vertical", "horizontal"]))
def test_pairs_stand_as_their_captions_say(seed: int, size: tuple[int, int], layout: str) -> None:
    rng = random.Random(seed)
    scene = scene_of(layout, rng)
    picture = draw(scene, *size, rng)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, size[1], size[0])
    first, second = (centre(picture, thing.colour) for thing in scene.things)
    axis = 1 if layout == "vertical" else 0
    assert second[axis] - first[axis] > 0.3


@settings(max_examples=30)
@given(SEEDS, st.sampled_from(PICTURE_SIZES))
def test_everything_lies_inside_and_the_front_covers_the_back(seed: int, size: tuple[int, int]) -> None:
    rng = random.Random(seed)
    scene = scene_of("overlap", rng)
    state = rng.getstate()
    shapes._gradient(scene.background, *size, rng)
    front, back = shapes._place(scene, *size, rng)
    for mark in (front, back):
        assert mark.radius <= mark.x <= size[0] - mark.radius
        assert mark.radius <= mark.y <= size[1] - mark.radius
    assert math.hypot(front.x - back.x, front.y - back.y) < front.radius + back.radius
    rng.setstate(state)
    picture = draw(scene, *size, rng)
    if front.shape not in ("ring", "triangle"):
        middle = picture[:, int(front.y), int(front.x)].float()
        assert float((middle - torch.tensor(front.colour).clamp(max=255)).abs().max()) <= 1


@pytest.mark.parametrize("layout, count", [("row", 3), ("column", 3), ("circle", 6)])
def test_repeated_objects_do_not_touch(layout: str, count: int) -> None:
    for width, height in PICTURE_SIZES:
        for seed in range(20):
            rng = random.Random(seed)
            marks = shapes._place(scene_of(layout, rng), width, height, rng)
            assert len(marks) == count
            for mark, other in itertools.combinations(marks, 2):
                assert math.hypot(mark.x - other.x, mark.y - other.y) > 1.7 * mark.radius


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("tilt", [0.0, 0.2])
def test_areas_are_those_of_the_shapes(shape: str, tilt: float) -> None:
    """Anti-aliased coverage adds up to the area of the ideal outline."""
    radius = random.uniform(20, 30)
    picture = torch.zeros(3, 128, 128)
    x, y = (64 + random.uniform(-3, 3) for _ in range(2))
    shapes._paint(picture, shapes._Mark(shape, (255.0, 255.0, 255.0), x, y, radius, tilt))
    star = 5 * 1.05 * 0.45 * math.sin(math.pi / 5)
    expected = {
        "circle": math.pi * 0.92**2,
        "ring": math.pi * (1 - 0.5**2),
        "square": 1.6**2,
        "star": star,
        "cross": 2 * 2 * 0.6 - 0.6**2,
    }
    # The base lies 0.55 radii below the centre, the sides 0.55 radii from it at 60 degrees, so the apex is 1.1 above.

    expected["triangle"] = 1.65**2 * math.tan(math.pi / 6)
    assert float(picture.sum()) / 3 / 255 / radius**2 == pytest.approx(expected[shape], rel=0.02)


def test_too_small_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="64x64 pixels or more, got 48x64"):
        draw(random_scene(random.Random(1)), 48, 64, random.Random(1))
