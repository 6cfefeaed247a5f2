# SPDX-License-Identifier: Apache-2.0
"""The image of the difference view."""

from __future__ import annotations

from PIL import Image, ImageChops

BRIGHTER = 4  # small differences are hard to see


def brighter_difference(first: Image.Image, second: Image.Image) -> Image.Image:
    """Return the absolute difference of two images of one size, ``BRIGHTER`` times as bright."""
    levels = ImageChops.difference(first.convert("RGB"), second.convert("RGB"))
    return levels.point(lambda level: BRIGHTER * level)
