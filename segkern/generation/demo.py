# SPDX-License-Identifier: Apache-2.0
"""Prompts, sizes and seeds of the demo images."""

from __future__ import annotations

from dataclasses import dataclass

SQUARE, WIDE = (64, 64), (96, 64)


@dataclass(frozen=True)
class Subject:
    """Arguments of one demo image.

    Attributes:
        prompt: Prompt; an empty string for an unconditional image.
        size: Width and height in pixels.
        seed: Seed of the initial noise.
    """

    prompt: str
    size: tuple[int, int]
    seed: int

    @property
    def heading(self) -> str:
        """Prompt, size and seed in one line."""
        width, height = self.size
        return f"{self.prompt or 'no prompt'} ({width} x {height}, seed {self.seed})"


PROMPTED = (
    Subject("fox", SQUARE, 1),
    Subject("smiling face with sunglasses on a blue background", SQUARE, 2),
    Subject("birthday cake on a pink background", SQUARE, 3),
    Subject("panda and pizza", WIDE, 4),
)
# Consecutive seeds from 1: the seeds were not selected by their results.
UNCONDITIONAL = tuple(Subject("", SQUARE, seed) for seed in range(1, 13))
