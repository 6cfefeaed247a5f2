# SPDX-License-Identifier: Apache-2.0
"""Recreate the sheet of emoji drawings from Debian packages: ``python -m studies.drawings``."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont, features

from studies.drawings.sheet import INDEX, Drawing

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
PACKAGES = {FONT: "fonts-noto-color-emoji", CLDR: "unicode-cldr-core"}
FONT_SIZE = 109  # the only size of the font's bitmaps
SIDE = 66  # longest side of a drawing in the sheet, in pixels
COLUMNS = 19
WIDEST = 200  # pixels; a wider drawing is a sequence that the font has no single image for
FACES = ("positive", "neutral", "negative", "sick", "role", "fantasy")
SUBGROUPS = {
    *(f"face-{kind}" for kind in FACES),
    *("cat-face", "monkey-face", "plant-flower", "plant-other", "drink"),
    *(f"animal-{kind}" for kind in ("mammal", "bird", "amphibian", "reptile", "marine", "bug")),
    *(f"food-{kind}" for kind in ("fruit", "vegetable", "prepared", "asian", "sweet")),
}


def names() -> dict[str, str]:
    """Return the English short name of every emoji in CLDR."""
    found = {}
    for folder in ("annotations", "annotationsDerived"):
        tree = xml.etree.ElementTree.parse(CLDR / folder / "en.xml")
        for annotation in tree.iter("annotation"):
            if annotation.get("type") == "tts" and annotation.text:
                found[annotation.attrib["cp"]] = annotation.text
    return found


def groups() -> dict[str, tuple[str, str]]:
    """Return the CLDR group and subgroup of every emoji, in CLDR's order."""
    found: dict[str, tuple[str, str]] = {}
    for line in (CLDR / "properties" / "labels.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        characters, group, subgroup = (field.strip() for field in line.split(";"))
        for sequence, first, last, single in re.findall(r"\{([^}]*)\}|(.)-(.)|(.)", characters[1:-1]):
            emoji = [chr(code) for code in range(ord(first), ord(last) + 1)] if first else [sequence or single]
            found |= dict.fromkeys(emoji, (group, subgroup))
    return found


def render(font: ImageFont.FreeTypeFont, emoji: str) -> Image.Image | None:
    """Return one emoji cropped to its outline as an RGBA image, or None if the font does not draw it."""
    image = Image.new("RGBA", (320, 220))
    ImageDraw.Draw(image).text((60, 40), emoji, font=font, embedded_color=True)
    box = image.getbbox()
    return image.crop(box) if box else None


def collect() -> list[tuple[str, str, str, Image.Image]]:
    """Return name, group, subgroup and image of every emoji of ``SUBGROUPS``; identical images appear once."""
    font = ImageFont.truetype(FONT, FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    known, chosen, seen = names(), [], set()
    for emoji, (group, subgroup) in groups().items():
        if subgroup not in SUBGROUPS or emoji not in known:
            continue
        image = render(font, emoji)
        if image is None or image.width > WIDEST or image.tobytes() in seen:
            continue
        seen.add(image.tobytes())
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)  # Pillow premultiplies alpha
        chosen.append((known[emoji], group, subgroup, image))
    return chosen


def check_sources() -> None:
    """Check that the font, the CLDR data and Pillow's text layout are installed.

    Raises:
        FileNotFoundError: If a Debian package or libraqm is missing.
    """
    for path, package in PACKAGES.items():
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; install the Debian package {package}")
    if not features.check("raqm"):
        raise FileNotFoundError("this build of Pillow has no libraqm, which lays out emoji; install libraqm0")


def main(
    out: Annotated[Path, typer.Option(help="Folder for sheet.png and sheet.json.")] = INDEX.parent,
) -> None:
    """Recreate the sheet of emoji drawings from the Noto Color Emoji font and the CLDR names."""
    try:
        check_sources()
    except FileNotFoundError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    chosen = collect()
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(chosen) // COLUMNS) * SIDE))
    entries = []
    for index, (name, group, subgroup, image) in enumerate(chosen):
        left, top = index % COLUMNS * SIDE, index // COLUMNS * SIDE
        sheet.paste(image, (left, top))
        entries.append(Drawing(name, group, subgroup, (left, top, left + image.width, top + image.height)))
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "sheet.png", optimize=True)
    lines = ",\n".join(json.dumps(vars(entry), ensure_ascii=False) for entry in entries)
    (out / "sheet.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    typer.echo(f"wrote {len(entries)} drawings to {out}")


if __name__ == "__main__":
    typer.run(main)
