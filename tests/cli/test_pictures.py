# SPDX-License-Identifier: Apache-2.0
"""Contact sheets and their text."""

from __future__ import annotations

from PIL import Image

from segkern.generation.pictures import Row, Tile, contact_sheet, drawable


def test_sheet_enlarges_small_pictures_alike_and_wraps_its_caption() -> None:
    wide, tall = Image.new("RGB", (160, 96), "red"), Image.new("RGB", (128, 128), "blue")
    short = contact_sheet([Row([Tile(wide, "a")] * 2), Row([Tile(tall, "b")] * 2, "heading")], "caption")
    long = contact_sheet([Row([Tile(wide, "a")] * 2), Row([Tile(tall, "b")] * 2, "heading")], "caption " * 40)
    assert long.width == short.width
    assert long.height > short.height
    colours = {colour: count for count, colour in short.getcolors(maxcolors=100_000)}
    assert colours[255, 0, 0] == 2 * 320 * 192
    assert colours[0, 0, 255] == 2 * 256 * 256


def test_text_that_the_font_lacks() -> None:
    assert drawable("Füchse, 狐 – ok") == "Fuchse, ? ? ok"
