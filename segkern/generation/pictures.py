# SPDX-License-Identifier: Apache-2.0
"""Image files: contact sheets, settings stored as text, and checks of output paths."""

from __future__ import annotations

import io
import json
import math
import os
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps, ImageStat
from PIL.PngImagePlugin import PngInfo

from segkern.generation.options import GUIDANCES

_PAPER, _INK, _FAINT = "white", "#1a1a1a", "#666666"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LEAST_TILE = 256  # longer side in pixels that smaller images are enlarged to
PARAMETERS = "parameters"  # text chunk of a PNG file
# Names that AUTOMATIC1111's web UI uses for schedulers of diffusers.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


@dataclass(frozen=True)
class Tile:
    """One image of a contact sheet.

    Attributes:
        image: The image.
        label: Text below the image.
    """

    image: Image.Image
    label: str


@dataclass(frozen=True)
class Row:
    """One row of a contact sheet.

    Attributes:
        tiles: Tiles from left to right, all of the same size.
        heading: Text above the row; empty for no heading.
    """

    tiles: Sequence[Tile]
    heading: str = ""


def contact_sheet(rows: Sequence[Row], caption: str, details: str = "") -> Image.Image:
    """Return a contact sheet: rows of labelled images under a caption, on a white background.

    Small images are enlarged by an integer factor without smoothing. The factor is the same for all images. Columns
    are as wide as the widest image or label.

    Args:
        rows: Rows of the sheet. At least one row, with at least one tile in each row.
        caption: Text at the top of the sheet, wrapped to its width.
        details: Smaller text below the caption.

    Example:
        >>> tile = Tile(Image.new("RGB", (128, 128)), "sigma 1")
        >>> contact_sheet([Row([tile, tile])], "a red fox").size
        (592, 384)
    """
    images = [tile.image for row in rows for tile in row.tiles]
    factor = -(-_LEAST_TILE // max(max(image.size) for image in images))
    cell = max(image.width for image in images) * factor
    columns = max(len(row.tiles) for row in rows)
    unit = max(16, cell // 16)  # all distances are multiples of the text size
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
    """Return the text in ASCII, for Pillow's default font. Accents are removed, other characters become ``?``.

    Example:
        >>> drawable("café σ")
        'cafe ?'
    """
    plain = unicodedata.normalize("NFKD", text)
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def check_target(path: Path, overwrite: bool) -> None:
    """Check that an output file can be written.

    Raises:
        ValueError: If the file exists and ``overwrite`` is false, if its folder does not exist, if its format is not
            supported, or if permission is denied.
    """
    if path.is_dir():
        raise ValueError(f"--out must be a file, but {str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"--out {str(path)!r} is in a folder that does not exist")
    if path.suffix.lower() not in _SUFFIXES:
        got = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise ValueError(f"--out {str(path)!r} has {got}; use one of {', '.join(_SUFFIXES)}")
    if path.exists() and not overwrite:
        raise ValueError(f"{str(path)!r} exists; use --overwrite or another --out")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"no permission to write --out {str(path)!r}")


def save(image: Image.Image, path: Path, metadata: Mapping[str, object], *, sheet: bool = False) -> bool:
    """Write an image. A PNG file contains the metadata as text chunks.

    Args:
        image: Image to write.
        path: Output file.
        metadata: Settings by name.
        sheet: Whether the image is a contact sheet. A sheet has no ``parameters``; see :func:`parameters`.

    Returns:
        Whether the file contains the metadata.
    """
    if path.suffix.lower() != ".png":
        image.save(path)
        return False
    image.save(path, pnginfo=_png_info(metadata, sheet))
    return True


def png(image: Image.Image, metadata: Mapping[str, object]) -> bytes:
    """Return the content of a PNG file with the metadata as text chunks."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=_png_info(metadata, sheet=False))
    return file.getvalue()


def _png_info(metadata: Mapping[str, object], sheet: bool) -> PngInfo:
    info = PngInfo()
    texts = {key: str(value) for key, value in metadata.items()}
    if not sheet and "prompt" in texts:
        texts[PARAMETERS] = parameters(texts)
    for key, text in texts.items():
        info.add_text(key, text) if text.isascii() else info.add_itxt(key, text)
    return info


def parameters(metadata: Mapping[str, str]) -> str:
    """Return the settings in the text format of AUTOMATIC1111's web UI, which many image tools read.

    Example:
        >>> settings = {"prompt": "a fox", "negative_prompt": "", "steps": "30", "guidance_scale": "5.0", "seed": "1"}
        >>> print(parameters(settings | {"width": "832", "height": "1216", "model": "demo", "seg_sigma": "inf"}))
        a fox
        Steps: 30, CFG scale: 5, Seed: 1, Size: 832x1216, Model: demo, SEG sigma: inf
    """
    names = {"steps": "Steps", "scheduler": "Sampler", "guidance_scale": "CFG scale", "seed": "Seed"}
    values = {names[key]: metadata[key] for key in names if key in metadata}
    values["Sampler"] = _SAMPLERS.get(values.get("Sampler", ""), values.get("Sampler", ""))
    values["CFG scale"] = f"{float(metadata['guidance_scale']):g}"
    values["Size"] = f"{metadata['width']}x{metadata['height']}"
    values["Model"] = metadata["model"]
    for key, value in metadata.items():
        method, _, field = key.partition("_")
        if method in GUIDANCES:
            values[f"{method.upper()} {field.replace('_', ' ')}"] = value
    quoted = (
        f"{key}: {json.dumps(value) if set(value) & set(',:') else value}" for key, value in values.items() if value
    )
    negative = metadata["negative_prompt"]
    lines = [metadata["prompt"], *([f"Negative prompt: {negative}"] if negative else []), ", ".join(quoted)]
    return "\n".join(lines)


def difference(first: Image.Image, second: Image.Image) -> float:
    """Return the mean absolute difference of two images of the same size, on a scale of 0 to 255."""
    channels = ImageStat.Stat(ImageChops.difference(first.convert("RGB"), second.convert("RGB"))).mean
    return sum(channels) / len(channels)


def difference_image(first: Image.Image, second: Image.Image, contrast: int = 1) -> Image.Image:
    """Return an image of the difference of two images of one size: white for equal pixels, black for opposite pixels.

    Args:
        first: Image.
        second: Image of the same size.
        contrast: Factor of the difference, to make small differences visible.

    Example:
        >>> difference_image(Image.new("RGB", (1, 1), "black"), Image.new("RGB", (1, 1), "gray")).getpixel((0, 0))
        127
    """
    levels = ImageChops.difference(first.convert("RGB"), second.convert("RGB")).convert("L")
    return ImageOps.invert(levels.point(lambda level: contrast * level))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Split the text into lines no wider than ``width`` pixels."""
    text = drawable(text)
    if not text:
        return []
    letters = max(1, int(width / (font.getlength(text) / len(text))))
    lines = textwrap.wrap(text, letters)
    while letters > 1 and any(font.getlength(line) > width for line in lines):
        letters -= 1
        lines = textwrap.wrap(text, letters)
    return lines
