# SPDX-License-Identifier: Apache-2.0
"""Pictures by the bundled model for the documentation: ``python -m benchmarks.demo_pictures`` writes ``docs/pictures``.

Seeds are the demonstration's own, in order, and none is left out for what it gave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from segkern.generation import loading
from segkern.generation.demo import SQUARE, UNPROMPTED
from segkern.generation.drawing import Job, draw
from segkern.generation.pictures import Row, Tile, contact_sheet
from segkern.integrations.diffusers import SEG

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
STEPS = 20

SEEDS = [subject.seed for subject in UNPROMPTED if subject.size == SQUARE]
SCALES = (1.0, 3.0, 6.0, 12.0, 24.0)
LOW_SCALES = (0.5, 1.0, 3.0)
SIGMAS = (1.0, 2.0, 5.0, math.inf)

Setting = tuple[str, SEG | None]


def guided() -> tuple[str, list[list[Setting]]]:
    """Without guidance and at growing blur, a row for each seed."""
    row: list[Setting] = [("no guidance", None), *((f"sigma {_word(s)}", SEG(3.0, s)) for s in SIGMAS[1:])]
    return "No prompt, the same noise in each row: without guidance, and with SEG at scale 3", [row] * len(SEEDS)


def scales() -> tuple[str, list[list[Setting]]]:
    """Blur from row to row, scale from column to column."""
    rows: list[list[Setting]] = [
        [("no guidance", None), *((f"sigma {_word(sigma)}, scale {scale:g}", SEG(scale, sigma)) for scale in SCALES)]
        for sigma in SIGMAS
    ]
    return f"No prompt, seed {SEEDS[0]} everywhere: blur downwards, scale to the right", rows


def layers() -> tuple[str, list[list[Setting]]]:
    """The same guidance in other layers."""
    rows: list[list[Setting]] = [
        [
            ("no guidance", None),
            *((f"{part}, scale {scale:g}", SEG(scale, math.inf, part)) for scale in (0.5, 1.0, 3.0)),
        ]
        for part in ("down", "mid", "up")
    ]
    return f"No prompt, seed {SEEDS[0]} everywhere: sigma infinity in one part of the denoiser", rows


def parts_of_the_run() -> tuple[str, list[list[Setting]]]:
    """The same guidance at other times."""
    base: dict[str, Any] = {"scale": 6.0, "sigma": math.inf}
    row: list[Setting] = [
        ("no guidance", None),
        ("whole run", SEG(**base)),
        ("stop=0.5", SEG(**base, stop=0.5)),
        ("start=0.5", SEG(**base, start=0.5)),
        ('schedule="linear"', SEG(**base, schedule="linear")),
        ("reuse=2", SEG(**base, reuse=2)),
    ]
    return "No prompt, the same noise in each row: scale 6 at sigma infinity in parts of the run", [row] * len(SEEDS)


SHEETS = {"guided.png": guided, "scales.png": scales, "layers.png": layers, "parts-of-the-run.png": parts_of_the_run}


def sheet(pipe: Any, caption: str, rows: Sequence[Sequence[Setting]]) -> Image.Image:
    """A picture of each setting; rows that are alike have one seed each."""
    alike = all(row == rows[0] for row in rows)
    drawn: dict[tuple[int, str], Image.Image] = {}
    found = []
    for index, row in enumerate(rows):
        seed = SEEDS[index] if alike else SEEDS[0]
        for label, spec in row:
            if (seed, label) not in drawn:
                job = Job("", "", *SQUARE, seed, STEPS, 1.0)
                drawn[seed, label] = draw(pipe, job, () if spec is None else (spec,)).image
        found.append(Row([Tile(drawn[seed, label], label) for label, _ in row], f"seed {seed}" if alike else ""))
    details = f"{STEPS} steps, no classifier-free guidance, segkern's bundled model of simple shapes (64 x 64 pixels)."
    return contact_sheet(found, caption, details)


def _word(sigma: float) -> str:
    return "infinity" if math.isinf(sigma) else f"{sigma:g}"


def main() -> None:
    """Draw all sheets."""
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    pipe = loading.load_pipeline(loading.find_model("demo"), torch.float32, torch.device("cpu"))
    for name, make in SHEETS.items():
        sheet(pipe, *make()).save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    main()
