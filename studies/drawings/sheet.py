# SPDX-License-Identifier: Apache-2.0
"""The committed sheet of emoji drawings: ``sheet.png`` and ``sheet.json``.

``python -m studies.drawings`` recreates both files from a font.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).with_name("sheet.png")
INDEX = Path(__file__).with_name("sheet.json")
LICENSES = Path(__file__).with_name("LICENSES.txt")
HELD_OUT_SEED = 8
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Drawing:
    """An entry of the sheet.

    Attributes:
        name: English short name in CLDR, which is the caption of the drawing.
        group: CLDR group, such as ``"Animals & Nature"``.
        subgroup: CLDR subgroup, such as ``"animal-bird"``.
        box: Left, top, right and bottom edges in the sheet, in pixels.
    """

    name: str
    group: str
    subgroup: str
    box: tuple[int, int, int, int]


@cache
def drawings() -> dict[str, Drawing]:
    """Return the drawings of the sheet by name, in the order of the sheet."""
    entries = json.loads(INDEX.read_text(encoding="utf-8"))
    return {entry["name"]: Drawing(**(entry | {"box": tuple(entry["box"])})) for entry in entries}


@cache
def held_out() -> tuple[str, ...]:
    """Return the names of the drawings that the model is not trained on."""
    names = list(drawings())
    return tuple(random.Random(HELD_OUT_SEED).sample(names, round(HELD_OUT_SHARE * len(names))))


@cache
def trained() -> tuple[str, ...]:
    """Return the names of the drawings that the model is trained on."""
    return tuple(name for name in drawings() if name not in held_out())


@cache
def sprite(name: str) -> Image.Image:
    """Return one drawing, cropped to its outline, as an RGBA image.

    Raises:
        KeyError: If the sheet has no drawing of this name.
    """
    return _sheet().crop(drawings()[name].box)


@cache
def _sheet() -> Image.Image:
    with Image.open(PICTURE) as image:
        return image.convert("RGBA")
