# SPDX-License-Identifier: Apache-2.0
"""Example images of the documentation: ``python -m studies.pictures``.

The seeds are consecutive from 1 and were not selected by their results. All images are unconditional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from segkern.generation.drawing import ImageRequest, Specs, draw
from segkern.generation.loading import find_model, load_pipeline, quiet_libraries
from segkern.generation.pictures import Row, Tile, contact_sheet
from segkern.integrations.diffusers import SEG

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
STEPS = 20
DETAILS = f"No prompt, no classifier-free guidance, {STEPS} steps of the bundled model."
BEFORE_AFTER_SEEDS = tuple(range(1, 7))
SHEET_SEEDS = (1, 2, 3)
SHEET_SEED = SHEET_SEEDS[0]

Draw = Callable[[int, Specs], Image.Image]  # from a seed and guidance specs


def before_after(image: Draw) -> Image.Image:
    """Return several seeds without and with SEG."""
    settings: dict[str, Specs] = {"No guidance": (), "SEG": (SEG(),)}
    rows = [
        Row([Tile(image(seed, specs), f"seed {seed}") for seed in BEFORE_AFTER_SEEDS], name)
        for name, specs in settings.items()
    ]
    seeds = (
        f"Seeds {BEFORE_AFTER_SEEDS[0]} to {BEFORE_AFTER_SEEDS[-1]}, not selected. The noise of a column is the same."
    )
    return contact_sheet(rows, "Before and after Smoothed Energy Guidance (SEG)", f"{seeds} {DETAILS}")


def scales(image: Draw) -> Image.Image:
    """Return one seed over sigma and scale."""
    rows = []
    for sigma in (1.0, 2.0, 5.0, math.inf):
        guided = [(f"sigma {sigma:g}, scale {scale:g}", (SEG(scale, sigma),)) for scale in (1.0, 3.0, 6.0, 12.0, 24.0)]
        rows.append(Row(_tiles(image, SHEET_SEED, guided)))
    return contact_sheet(rows, f"Seed {SHEET_SEED} over sigma and scale", DETAILS)


def layers(image: Draw) -> Image.Image:
    """Return one seed over the part of the denoiser that is guided."""
    rows = []
    for part in ("down", "mid", "up"):
        guided = [(f"{part}, scale {scale:g}", (SEG(scale, layers=part),)) for scale in (0.5, 1.0, 3.0)]
        rows.append(Row(_tiles(image, SHEET_SEED, guided)))
    return contact_sheet(rows, f"Seed {SHEET_SEED} over layers and scale, sigma infinity", DETAILS)


def steps(image: Draw) -> Image.Image:
    """Return several seeds over the range of guided steps."""
    specs = {
        "all steps": SEG(6.0),
        "stop=0.5": SEG(6.0, stop=0.5),
        "start=0.5": SEG(6.0, start=0.5),
        'schedule="linear"': SEG(6.0, schedule="linear"),
        "reuse=2": SEG(6.0, reuse=2),
    }
    guided = [(name, (spec,)) for name, spec in specs.items()]
    rows = [Row(_tiles(image, seed, guided), f"seed {seed}") for seed in SHEET_SEEDS]
    return contact_sheet(rows, "Ranges of guided steps, scale 6, sigma infinity", DETAILS)


SHEETS = {"before-after": before_after, "scales": scales, "layers": layers, "steps": steps}


def _tiles(image: Draw, seed: int, guided: Sequence[tuple[str, Specs]]) -> list[Tile]:
    settings: list[tuple[str, Specs]] = [("no guidance", ()), *guided]
    return [Tile(image(seed, specs), name) for name, specs in settings]


def write(folder: Path) -> Iterator[Path]:
    """Write all sheets, and yield their paths."""
    pipe = load_pipeline(find_model("demo"), torch.float32, torch.device("cpu"))

    def image(seed: int, specs: Specs) -> Image.Image:
        return draw(pipe, ImageRequest("", "", 64, 64, seed, STEPS, 1.0), specs).image

    for name, sheet in SHEETS.items():
        path = folder / f"{name}.png"
        sheet(image).quantize(256).save(path, optimize=True)  # a third of the size, without a visible difference
        yield path


def main(out: Annotated[Path, typer.Option(help="Output folder.")] = FOLDER) -> None:
    """Generate the example images of the documentation with the bundled model."""
    quiet_libraries()
    for path in write(out):
        typer.echo(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
