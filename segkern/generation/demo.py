# SPDX-License-Identifier: Apache-2.0
"""Prompts, sizes and seeds that show what the bundled model and guidance do."""

from __future__ import annotations

from dataclasses import dataclass

SQUARE, WIDE = (64, 64), (96, 64)


@dataclass(frozen=True)
class Subject:
    """One row of a sheet.

    Attributes:
        prompt: empty for none.
        size: width and height in pixels.
        seed: of the noise.
    """

    prompt: str
    size: tuple[int, int]
    seed: int

    @property
    def heading(self) -> str:
        width, height = self.size
        return f"{self.prompt or 'no prompt'} ({width} x {height}, seed {self.seed})"


PROMPTED = (
    Subject("a large red ring above a small blue square", SQUARE, 1),
    Subject("six yellow stars in a circle on a dark background", SQUARE, 2),
    Subject("a small orange cross in front of a large purple circle", SQUARE, 3),
    Subject("a row of three green triangles on a light background", WIDE, 4),
)
UNPROMPTED = (
    Subject("", SQUARE, 11),
    Subject("", SQUARE, 12),
    Subject("", SQUARE, 13),
    Subject("", WIDE, 14),
)
