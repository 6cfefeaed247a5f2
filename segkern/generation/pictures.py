# SPDX-License-Identifier: Apache-2.0
"""Pictures on disk: labelled comparison sheets, text metadata, and which files can be written at all."""

from __future__ import annotations

import math
import os
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps, ImageStat
from PIL.PngImagePlugin import PngInfo

_PAPER, _INK, _FAINT = "white", "#1a1a1a", "#666666"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LEAST_TILE = 256  # smaller pictures are enlarged by a whole factor until a longer side has as many pixels


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        image: the picture.
        label: written below it.
    """

    image: Image.Image
    label: str


@dataclass(frozen=True)
class Row:
    """One row of a sheet.

    Attributes:
        tiles: from left to right, all of one size.
        heading: written above them; none when empty.
    """

    tiles: Sequence[Tile]
    heading: str = ""


def contact_sheet(rows: Sequence[Row], caption: str, details: str = "") -> Image.Image:
    """Rows of labelled pictures under a caption, on white.

    Small pictures are enlarged by one whole factor, the same for all, without smoothing. Tiles stand in
    columns as wide as the widest tile or label, with their left edges in line.

    Args:
        rows: at least one, each with at least one tile.
        caption: the first lines, wrapped to the sheet's width.
        details: smaller lines below the caption.

    Example:
        >>> tile = Tile(Image.new("RGB", (128, 128)), "sigma 1")
        >>> contact_sheet([Row([tile, tile])], "a red fox").size
        (592, 384)
    """
    images = [tile.image for row in rows for tile in row.tiles]
    factor = -(-_LEAST_TILE // max(max(image.size) for image in images))
    cell = max(image.width for image in images) * factor
    columns = max(len(row.tiles) for row in rows)
    unit = max(16, cell // 16)  # every distance is a multiple of the size of the letters
    gap, margin = unit, 2 * unit
    big, small = ImageFont.load_default(size=unit * 9 // 8), ImageFont.load_default(size=unit * 7 // 8)
    labels = [drawable(tile.label) for row in rows for tile in row.tiles]
    cell = max(cell, *(math.ceil(small.getlength(text)) for text in labels))
    width = 2 * margin + columns * cell + (columns - 1) * gap

    lines = _wrap(caption, big, width - 2 * margin)
    fine_print = _wrap(details, small, width - 2 * margin)
    line = unit * 3 // 2
    top = margin + line * (len(lines) + len(fine_print)) + gap
    heights = [max(tile.image.height for tile in row.tiles) * factor for row in rows]
    extras = [line + unit + (line if row.heading else 0) for row in rows]
    height = top + sum(heights) + sum(extras) + margin - unit

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, text in enumerate(lines):
        draw.text((margin, margin + index * line), text, fill=_INK, font=big)
    for index, text in enumerate(fine_print):
        draw.text((margin, margin + (len(lines) + index) * line), text, fill=_FAINT, font=small)
    y = top
    for row, row_height, extra in zip(rows, heights, extras, strict=True):
        if row.heading:
            draw.text((margin, y), drawable(row.heading), fill=_INK, font=big)
            y += line
        for column, tile in enumerate(row.tiles):
            x = margin + column * (cell + gap)
            size = (tile.image.width * factor, tile.image.height * factor)
            sheet.paste(tile.image.convert("RGB").resize(size, Image.Resampling.NEAREST), (x, y))
            draw.text((x, y + row_height + unit // 4), drawable(tile.label), fill=_INK, font=small)
        y += row_height + extra - (line if row.heading else 0)
    return sheet


def drawable(text: str) -> str:
    """The text in the letters that Pillow's own font has: accents dropped, others as question marks.

    Example:
        >>> drawable("café σ")
        'cafe ?'
    """
    plain = unicodedata.normalize("NFKD", text)
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Raises:
        ValueError: for an existing file without ``overwrite``, a folder that is not there, and a suffix of another
            format; the message quotes the path.
    """
    if path.is_dir():
        raise ValueError(f"--out must be a file, and {str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of --out {str(path)!r} does not exist")
    if path.suffix.lower() not in _SUFFIXES:
        got = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise ValueError(f"--out {str(path)!r} has {got}; use one of {', '.join(_SUFFIXES)}")
    if path.exists() and not overwrite:
        raise ValueError(f"{str(path)!r} exists; give --overwrite or another --out")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--out {str(path)!r} cannot be written: permission denied")


def save(image: Image.Image, path: Path, metadata: Mapping[str, object]) -> bool:
    """Write a picture, as PNG with its metadata as text chunks.

    Returns:
        Whether the metadata are in the file; other formats have no place for them.
    """
    if path.suffix.lower() != ".png":
        image.save(path)
        return False
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value)) if not str(value).isascii() else info.add_text(key, str(value))
    image.save(path, pnginfo=info)
    return True


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, in levels of 0 to 255."""
    channels = ImageStat.Stat(ImageChops.difference(first.convert("RGB"), second.convert("RGB"))).mean
    return sum(channels) / len(channels)


def difference_image(first: Image.Image, second: Image.Image) -> Image.Image:
    """Return where two images of one size differ, in shades of gray: white for equal pixels, black for opposite ones.

    Example:
        >>> difference_image(Image.new("RGB", (1, 1), "black"), Image.new("RGB", (1, 1), "gray")).getpixel((0, 0))
        127
    """
    return ImageOps.invert(ImageChops.difference(first.convert("RGB"), second.convert("RGB")).convert("L"))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines no wider than ``width`` pixels."""
    text = drawable(text)
    if not text:
        return []
    letters = max(1, int(width / (font.getlength(text) / len(text))))
    lines = textwrap.wrap(text, letters)
    while letters > 1 and any(font.getlength(line) > width for line in lines):
        letters -= 1
        lines = textwrap.wrap(text, letters)
    return lines
