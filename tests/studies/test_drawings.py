# SPDX-License-Identifier: Apache-2.0
"""Compositions show the drawings of their captions, and the sheet of drawings can be recreated."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from segkern.generation.demo import PROMPTED
from segkern.generation.loading import DEMO, find_model
from segkern.generation.vocabulary import unknown_words_warning
from studies.drawings import __main__ as command
from studies.drawings import scenes
from studies.drawings.scenes import BACKGROUNDS, PICTURE_SIZES, Scene, attributes, draw, numbered, random_scene
from studies.drawings.sheet import INDEX, LICENSES, PICTURE, drawings, held_out, sprite, trained

SEEDS = st.integers(0, 2**32)


def is_drawn(picture: torch.Tensor, background: str) -> torch.Tensor:
    """Return the pixels that differ from the background, bool ``[height, width]``."""
    return (picture != torch.tensor(BACKGROUNDS[background], dtype=torch.uint8)[:, None, None]).any(0)


def test_the_sheet_has_named_drawings() -> None:
    assert len(drawings()) == 339
    assert {"fox", "pizza", "smiling face with sunglasses"} <= set(trained())
    for name, drawing in drawings().items():
        image = sprite(name)
        assert image.mode == "RGBA"
        assert 40 <= max(image.size) <= 66, name
        assert drawing.subgroup in command.SUBGROUPS
        levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(-1, 4)
        opaque = (levels[:, 3] > 250).float().mean()
        assert opaque > 0.1, name
    assert PICTURE.stat().st_size < 2_200_000


def test_a_tenth_of_the_drawings_is_held_out() -> None:
    assert len(held_out()) == 34
    assert set(held_out()) | set(trained()) == set(drawings())
    assert not set(held_out()) & set(trained())
    for index in range(50):
        assert not set(numbered(5, index)[0].names) & set(held_out())
        assert set(numbered(5, index, names=held_out())[0].names) <= set(held_out())


def test_a_number_names_one_composition() -> None:
    scene, picture = numbered(1, 3)
    again, same = numbered(1, 3)
    assert scene == again
    assert torch.equal(picture, same)
    assert not torch.equal(numbered(1, 11)[1], picture)
    assert {tuple(numbered(1, index)[1].shape[:0:-1]) for index in range(8)} == set(PICTURE_SIZES)


@settings(max_examples=50)
@given(SEEDS, st.sampled_from(PICTURE_SIZES))
def test_captions_name_everything_in_order(seed: int, size: tuple[int, int]) -> None:
    scene = random_scene(random.Random(seed), *size)
    words = {"single": None, "beside": " and ", "above": " above "}[scene.layout]
    caption = words.join(scene.names) if words else scene.names[0]
    article = "an" if scene.background == "orange" else "a"
    assert scene.caption in (caption, f"{caption} on {article} {scene.background} background")
    assert scene.names_background == (scene.caption != caption)
    possible = {(64, 64): {"single"}, (96, 64): {"single", "beside"}, (64, 96): {"single", "above"}}
    assert scene.layout in possible[size]
    answers = [known[label] for label, known in zip(scene.labels(), attributes().values(), strict=True)]
    assert answers == list(scene.answers().values())


@settings(max_examples=30)
@given(SEEDS, st.sampled_from(PICTURE_SIZES))
def test_every_drawing_has_its_own_area(seed: int, size: tuple[int, int]) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng, *size, trained()[:200])
    picture = draw(scene, *size, rng)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, size[1], size[0])
    drawn = is_drawn(picture, scene.background)
    parts = {"single": [drawn], "beside": drawn.chunk(2, 1), "above": drawn.chunk(2, 0)}[scene.layout]
    assert len(parts) == len(scene.names)
    assert all(part.float().mean() > 0.05 for part in parts)


def test_transparent_pixels_leave_no_fringe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The colour of transparent pixels, here black, does not bleed into a white drawing."""
    disc = Image.new("RGBA", (66, 66), (0, 0, 0, 0))
    ImageDraw.Draw(disc).ellipse((2, 2, 63, 63), fill=(255, 255, 255, 255))
    monkeypatch.setattr(scenes, "sprite", lambda name: disc)
    scene = Scene("single", ("disc",), "pink", "disc")
    picture = draw(scene, 64, 64, random.Random(1)).int()
    assert (picture >= torch.tensor(BACKGROUNDS["pink"])[:, None, None] - 2).all()
    assert (picture == 255).all(0).float().mean() > 0.3


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 64x64 pixels, got 48x64"):
        draw(random_scene(random.Random(1), 64, 64), 48, 64, random.Random(1))


@pytest.mark.skipif(not all(path.exists() for path in command.PACKAGES), reason="the Debian packages are not installed")
def test_the_sheet_can_be_recreated(tmp_path: Path) -> None:
    command.check_sources()
    command.main(tmp_path)
    new, committed = (json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "sheet.json", INDEX))
    assert [entry["name"] for entry in new] == [entry["name"] for entry in committed]


def test_a_missing_font_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PACKAGES", {tmp_path / "font.ttf": "fonts-noto-color-emoji"})
    with pytest.raises(typer.Exit):
        command.main(tmp_path)
    error = capsys.readouterr().err
    assert error.endswith("font.ttf does not exist; install the Debian package fonts-noto-color-emoji\n")
    assert error.count("\n") == 1


def test_the_checkpoint_names_its_drawings_and_their_licences() -> None:
    names = json.loads((DEMO / "names.json").read_text(encoding="utf-8"))
    assert names == {"drawings": list(trained()), "backgrounds": list(BACKGROUNDS)}
    licences = (DEMO / LICENSES.name).read_text(encoding="utf-8")
    assert licences == LICENSES.read_text(encoding="utf-8")
    assert all(part in licences for part in ("SIL OPEN FONT LICENSE", "Apache License", "Unicode, Inc."))
    assert LICENSES.name in (DEMO / "README.md").read_text(encoding="utf-8")


def test_the_demo_prompts_are_captions() -> None:
    assert unknown_words_warning(find_model("demo"), *(subject.prompt for subject in PROMPTED)) is None
    for subject in PROMPTED:
        names = re.split(" and | above ", re.sub(r" on an? \w+ background$", "", subject.prompt))
        assert set(names) <= set(trained()), subject
