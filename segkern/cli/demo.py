# SPDX-License-Identifier: Apache-2.0
"""``segkern demo``: images of the bundled model before and after guidance, and its measured quality."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from segkern.cli.terminal import draw_with_progress, need_diffusers, refusing
from segkern.generation import loading
from segkern.generation.demo import PROMPTED, UNCONDITIONAL, Subject
from segkern.generation.drawing import ImageRequest, ImageResult, Specs, image_metadata, label
from segkern.generation.pictures import (
    Row,
    Tile,
    check_target,
    contact_sheet,
    difference,
    difference_image,
    save,
)
from segkern.generation.tables import new_table, percent, show

_SCALE, _SIGMA = 3.0, math.inf  # the defaults of the paper and of SEG
_CFG = 3.0
_UNCONDITIONAL, _PROMPTS = "demo.png", "demo-prompts.png"
_PAIRS_PER_ROW = 2
_MEASURES = {
    "frechet_distance": "Frechet ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "caption_accuracy": "caption\naccuracy ↑",
}
# The paper recommends 10 for SDXL's mid block, which has 32x32 tokens; the bundled model has 16x16.
_PAPER_SIGMAS = (5.0, math.inf)


def demo(
    out: Annotated[Path, typer.Option(help="Output folder; it is created if needed.")] = Path("outputs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite existing images.")] = False,
    steps: Annotated[int, typer.Option(min=1, hidden=True)] = 20,
) -> None:
    """Show the bundled model before and after guidance.

    Writes contact sheets of images and prints the measured quality of the model.
    """
    need_diffusers()
    from segkern.integrations.diffusers import SEG

    with refusing():
        out.mkdir(parents=True, exist_ok=True)
        for name in (_UNCONDITIONAL, _PROMPTS):
            check_target(out / name, overwrite)
        device = loading.find_device("auto")
        dtype = loading.find_dtype("auto", device)
        source = loading.find_model("demo")
        pipe = loading.load_pipeline(source, dtype, device)
    guided: Specs = (SEG(_SCALE, _SIGMA, "mid"),)
    table = new_table("guidance", "images", "seconds\nper image", "attention\nmoved", "pixels\nchanged")

    def images_of(subjects: Sequence[Subject], cfg: float) -> list[list[ImageResult]]:
        """Return the image of each subject without and with SEG, and add both settings to the table."""
        requests = [ImageRequest(subject.prompt, "", *subject.size, subject.seed, steps, cfg) for subject in subjects]
        results = [draw_with_progress(pipe, request, [(), guided]) for request in requests]
        changed = [difference(plain.image, with_seg.image) / 255 for plain, with_seg in results]
        for index, specs in enumerate([(), guided]):
            seconds = sum(pair[index].seconds for pair in results) / len(results)
            cells = (
                [_moved([pair[1] for pair in results]), percent(sum(changed) / len(changed))] if specs else ["-"] * 2
            )
            table.add_row(label(specs, cfg), str(len(results)), f"{seconds:.1f}", *cells)
        return results

    def details(subjects: Sequence[Subject]) -> dict[str, object]:
        first = subjects[0]
        request = ImageRequest(first.prompt, "", *first.size, first.seed, steps, 1.0)
        return image_metadata(source, request, guided, dtype, pipe.scheduler) | {
            "prompt": "; ".join(subject.prompt for subject in subjects if subject.prompt),
            "seed": ", ".join(str(subject.seed) for subject in subjects),
        }

    parameters = f"{sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.1f} million parameters"
    model = f"{steps} steps of a model of {parameters} that comes with segkern."
    seg = f"SEG scale {_SCALE:g}, sigma {'infinity' if math.isinf(_SIGMA) else _SIGMA}, in the mid block"
    _save_unconditional(images_of(UNCONDITIONAL, 1.0), f"{seg}; {model}", details(UNCONDITIONAL), out / _UNCONDITIONAL)
    columns = [
        pair + with_cfg for pair, with_cfg in zip(images_of(PROMPTED, 1.0), images_of(PROMPTED, _CFG), strict=True)
    ]
    labels = [label(specs, cfg) for cfg in (1.0, _CFG) for specs in ((), guided)]
    rows = [
        Row([Tile(result.image, name) for name, result in zip(labels, row, strict=True)], subject.heading)
        for subject, row in zip(PROMPTED, columns, strict=True)
    ]
    caption = "Prompts: no guidance, SEG, classifier-free guidance (CFG), and both"
    sheet = contact_sheet(rows, caption, f"The images of a row start from the same noise. {seg}; {model}")
    save(sheet, out / _PROMPTS, details(PROMPTED) | {"guidance_scale": f"1, {_CFG:g}"}, sheet=True)

    show(table)
    typer.echo("attention moved: |perturbed - conditional| / |conditional| of the guided layers' output")
    evaluation = json.loads((loading.DEMO / "evaluation.json").read_text(encoding="utf-8"))
    evaluated = _evaluation_table(evaluation)
    show(evaluated)
    typer.echo(f"{evaluation['images_per_seed']} images for each of {len(evaluation['seeds'])} seeds")
    typer.echo(evaluation["verdict"])
    for name in (_UNCONDITIONAL, _PROMPTS):
        typer.echo(f"wrote {out / name}")


def _save_unconditional(
    results: Sequence[Sequence[ImageResult]], model: str, details: dict[str, object], path: Path
) -> None:
    """Save a sheet of images before and after SEG with their difference, two seeds to a row."""
    tiles = []
    for subject, (plain, guided) in zip(UNCONDITIONAL, results, strict=True):
        tiles += [
            Tile(plain.image, f"seed {subject.seed}: no guidance"),
            Tile(guided.image, f"seed {subject.seed}: SEG"),
            Tile(difference_image(plain.image, guided.image), "difference"),
        ]
    per_row = 3 * _PAIRS_PER_ROW
    rows = [Row(tiles[first : first + per_row]) for first in range(0, len(tiles), per_row)]
    caption = "Before and after Smoothed Energy Guidance (SEG): no prompt, no classifier-free guidance"
    seeds = f"Seeds {UNCONDITIONAL[0].seed} to {UNCONDITIONAL[-1].seed}, not selected."
    explanation = "Both images of a seed start from the same noise. Difference: the darker, the larger the change."
    save(contact_sheet(rows, caption, f"{seeds} {explanation} {model}"), path, details, sheet=True)


def _moved(results: Sequence[ImageResult]) -> str:
    """Return the mean relative change of each guided layer's output."""
    moved: dict[str, list[float]] = {}
    for result in results:
        assert result.report is not None
        for row in result.report.to_dict()["layers"]:
            moved.setdefault(row["layer"], []).append(row["moved"])
    return ", ".join(f"{layer} {percent(sum(values) / len(values))}" for layer, values in moved.items())


def _evaluation_table(evaluation: dict[str, Any]) -> Table:
    """Return no guidance, CFG alone, the paper's settings and the setting chosen on other seeds."""
    table = new_table("mode", "guidance", *_MEASURES.values(), title="Evaluation of the bundled model", gap=1)
    for row in evaluation["rows"]:
        setting = row["setting"]
        cfg, scale, sigma = setting["cfg"], setting["seg"], float(setting["sigma"])
        by_paper = (cfg, scale) == (1.0, _SCALE) and sigma in _PAPER_SIGMAS
        if not scale or by_paper or setting == evaluation["chosen"]:
            guidance = [f"CFG {cfg:g}"] * (cfg > 1) + [f"SEG σ={sigma:g} scale {scale:g}"] * (scale > 0)
            measures = (row["measures"].get(name) for name in _MEASURES)
            cells = ("" if value is None else f"{value['mean']:.2f} ± {value['spread']:.2f}" for value in measures)
            table.add_row(setting["mode"], " + ".join(guidance) or "no guidance", *cells)
    return table
