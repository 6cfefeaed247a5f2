# SPDX-License-Identifier: Apache-2.0
"""The sheets of pictures that ``segkern demo`` draws with the bundled checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segkern.generation.drawing import Drawn, Job, Specs, describe, draw_all, label
from segkern.generation.loading import Source
from segkern.generation.pictures import Row, Tile, contact_sheet, save

SQUARE, WIDE = (64, 64), (96, 64)
SCALE = 3.0


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
FILES = {"demo.png": PROMPTED, "demo-unconditional.png": UNPROMPTED}


def sheets(
    pipe: Any, source: Source, dtype: torch.dtype, plan: Sequence[Specs], steps: int, folder: Path
) -> Iterator[tuple[Subject, list[Drawn]]]:
    """Draw all subjects, a sheet per file; yields each subject and its pictures."""
    for name, subjects in FILES.items():
        rows = []
        for subject in subjects:
            job = Job(subject.prompt, "", *subject.size, subject.seed, steps, 1.0)
            drawn = draw_all(pipe, job, plan)
            tiles = [Tile(one.image, label(specs)) for specs, one in zip(plan, drawn, strict=True)]
            rows.append(Row(tiles, subject.heading))
            yield subject, drawn
        guided = next(specs for specs in plan if specs)
        what = "with prompts" if subjects[0].prompt else "without prompts"
        fine_print = (
            f"Each row: the same noise, first without guidance, then with Smoothed Energy Guidance at scale "
            f"{guided[0].scale:g} and growing blur of the queries in the mid block's self-attention (16 x 16 tokens). "
            f"No classifier-free guidance, {steps} steps, a model of "
            f"{sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.1f} million parameters that comes with segkern."
        )
        settings = [describe(source, job, specs, dtype) for specs in plan if specs]
        details = settings[0] | {
            "prompt": "; ".join(subject.prompt for subject in subjects),
            "seed": ", ".join(str(subject.seed) for subject in subjects),
            "width": ", ".join(str(subject.size[0]) for subject in subjects),
            "height": ", ".join(str(subject.size[1]) for subject in subjects),
            "seg_sigma": ", ".join(str(each["seg_sigma"]) for each in settings),
        }
        save(contact_sheet(rows, f"segkern: guidance {what}", fine_print), folder / name, details)
