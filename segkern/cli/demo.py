# SPDX-License-Identifier: Apache-2.0
"""``segkern demo``: two sheets of pictures by the bundled model, and what its evaluation measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from segkern.cli.terminal import NUMBERS, SIGMAS, draw_with_progress, need_diffusers, refusing
from segkern.generation import loading
from segkern.generation.demo import PROMPTED, UNPROMPTED, Subject
from segkern.generation.drawing import ImageRequest, ImageResult, Specs, image_metadata, label
from segkern.generation.options import parse_list
from segkern.generation.pictures import Row, Tile, check_target, contact_sheet, difference, save
from segkern.generation.tables import percent, wide

_SCALE = 3.0
_SHEETS = {"demo.png": PROMPTED, "demo-unconditional.png": UNPROMPTED}
_MEASURES = {
    "frechet_distance": "Frechet ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "caption_accuracy": "caption accuracy ↑",
}
# As the paper recommends: its sigma 10 acts on SDXL's 32x32 tokens, the bundled model has 16x16 there.
_PAPER_SIGMAS = (5.0, float("inf"))


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures; it is made.")] = Path("outputs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pictures.")] = False,
    steps: Annotated[int, typer.Option(min=1, hidden=True)] = 20,
) -> None:
    """Draw two sheets with the bundled checkpoint, with prompts and without, by sigma; and say what was measured."""
    need_diffusers()
    from segkern.integrations.diffusers import SEG

    with refusing():
        out.mkdir(parents=True, exist_ok=True)
        for name in _SHEETS:
            check_target(out / name, overwrite)
        device = loading.find_device("auto")
        dtype = loading.find_dtype("auto", device)
        source = loading.find_model("demo")
        pipe = loading.load_pipeline(source, dtype, device)
    plan: list[Specs] = [
        (),
        *((SEG(_SCALE, sigma, "mid"),) for sigma in parse_list("--sigmas", SIGMAS, float, NUMBERS)),
    ]
    table = Table("picture", "run", "seconds", "attention moved", "picture changed")
    for name, subjects in _SHEETS.items():
        results: dict[Subject, list[ImageResult]] = {}
        for subject in subjects:
            request = ImageRequest(subject.prompt, "", *subject.size, subject.seed, steps, 1.0)
            results[subject] = draw_with_progress(pipe, request, plan)
            for specs, result in zip(plan, results[subject], strict=True):
                changed = f"{difference(result.image, results[subject][0].image):.1f} / 255" if specs else "-"
                table.add_row(
                    subject.heading,
                    label(specs, request.guidance_scale),
                    f"{result.seconds:.1f}",
                    _moved(result),
                    changed,
                )
        metadata = [image_metadata(source, request, specs, dtype) for specs in plan if specs]
        _save_sheet(results, plan, metadata, sum(p.numel() for p in pipe.unet.parameters()), out / name)
    wide(table).print(table)
    typer.echo("attention moved: |perturbed - conditional| / |conditional| of the guided layers' output")

    evaluation = json.loads((loading.DEMO / "evaluation.json").read_text(encoding="utf-8"))
    evaluated = _evaluation_table(evaluation)
    wide(evaluated).print(evaluated)
    typer.echo(f"{evaluation['images_per_seed']} images for each of {len(evaluation['seeds'])} seeds")
    typer.echo(evaluation["verdict"])
    for name in _SHEETS:
        typer.echo(f"wrote {out / name}")


def _save_sheet(
    results: Mapping[Subject, Sequence[ImageResult]],
    plan: Sequence[Specs],
    metadata: Sequence[dict[str, object]],
    parameters: int,
    path: Path,
) -> None:
    """A row for each subject, with the metadata of all of them."""
    rows = [
        Row([Tile(result.image, label(specs, 1.0)) for specs, result in zip(plan, row, strict=True)], subject.heading)
        for subject, row in results.items()
    ]
    with_prompts = any(subject.prompt for subject in results)
    fine_print = (
        f"Each row: the same noise, first without guidance, then with Smoothed Energy Guidance at scale {_SCALE:g} and "
        f"growing blur of the queries in the mid block's self-attention (16 x 16 tokens). No classifier-free guidance, "
        f"{metadata[0]['steps']} steps, a model of {parameters / 1e6:.1f} million parameters that comes with segkern."
    )
    details = metadata[0] | {
        "prompt": "; ".join(subject.prompt for subject in results),
        "seed": ", ".join(str(subject.seed) for subject in results),
        "width": ", ".join(str(subject.size[0]) for subject in results),
        "height": ", ".join(str(subject.size[1]) for subject in results),
        "seg_sigma": ", ".join(str(settings["seg_sigma"]) for settings in metadata),
    }
    caption = f"segkern: guidance {'with prompts' if with_prompts else 'without prompts'}"
    save(contact_sheet(rows, caption, fine_print), path, details)


def _moved(result: ImageResult) -> str:
    """Relative distance by which guidance moved the output of each guided layer."""
    if result.report is None:
        return "-"
    return ", ".join(f"{row['layer']} {percent(row['moved'])}" for row in result.report.to_dict()["layers"])


def _evaluation_table(evaluation: dict[str, Any]) -> Table:
    """No guidance, CFG alone, the paper's settings, and the one chosen on other seeds."""
    table = Table("mode", "guidance", *_MEASURES.values(), title="measured before")
    for row in evaluation["rows"]:
        setting = row["setting"]
        cfg, scale, sigma = setting["cfg"], setting["seg"], float(setting["sigma"])
        by_paper = (cfg, scale) == (1.0, _SCALE) and sigma in _PAPER_SIGMAS
        if not scale or by_paper or setting == evaluation["chosen"]:
            guidance = [f"CFG {cfg:g}"] * (cfg > 1) + [f"SEG σ={sigma:g} scale {scale:g}"] * (scale > 0)
            measures = (row["measures"].get(name) for name in _MEASURES)
            cells = ("" if value is None else f"{value['mean']:.2f} ± {value['spread']:.2f}" for value in measures)
            table.add_row(setting["mode"], " + ".join(guidance) or "none", *cells)
    return table
