# SPDX-License-Identifier: Apache-2.0
"""``segkern demo``: two sheets of pictures by the bundled model, and what its evaluation measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from segkern.cli.terminal import NUMBERS, SIGMAS, need_diffusers, refusing
from segkern.core.dispatch import choose_backend
from segkern.generation import loading
from segkern.generation.demo import FILES, SCALE, sheets
from segkern.generation.drawing import Drawn, Specs, label
from segkern.generation.options import listed
from segkern.generation.pictures import check_target, difference
from segkern.generation.tables import percent, wide

_MEASURES = {
    "frechet_distance": "Frechet ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "caption_accuracy": "caption accuracy ↑",
}
# As the paper recommends: its sigma 10 acts on SDXL's 32x32 tokens, the bundled model has 16x16 there.
_PAPER_SCALE, _PAPER_SIGMAS = 3.0, (5.0, float("inf"))


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures; it is made.")] = Path("outputs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pictures.")] = False,
    steps: Annotated[int, typer.Option(min=1, hidden=True)] = 20,
) -> None:
    """Draw two sheets with the bundled checkpoint, with prompts and without, by sigma; and say what was measured."""
    need_diffusers()
    from segkern.integrations.diffusers import SEG, list_layers

    with refusing():
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            check_target(out / name, overwrite)
        device = loading.find_device("auto")
        dtype = loading.find_dtype("auto", device)
        source = loading.find_model("demo")
        pipe = loading.load_pipeline(source, dtype, device)
    plan: list[Specs] = [(), *((SEG(SCALE, sigma),) for sigma in listed("--sigmas", SIGMAS, float, NUMBERS))]
    head_dim = next(layer.head_dim for layer in list_layers(pipe) if layer.part == "mid")
    backend, reason = choose_backend(device, dtype, head_dim)

    table = Table("picture", "run", "attention served by", "seconds", "attention moved", "picture changed")
    for subject, pictures in sheets(pipe, source, dtype, plan, steps, out):
        for specs, picture in zip(plan, pictures, strict=True):
            served = backend if specs else "pipeline's own"
            changed = f"{difference(picture.image, pictures[0].image):.1f} / 255" if specs else "-"
            table.add_row(subject.heading, label(specs), served, f"{picture.seconds:.1f}", _moved(picture), changed)
    wide(table).print(table)
    typer.echo(f"seg_attention on {device}, {str(dtype).removeprefix('torch.')}: {backend}, because: {reason}")
    typer.echo("attention moved: |perturbed - conditional| / |conditional| of the guided layers' output")

    evaluation = json.loads((loading.DEMO / "evaluation.json").read_text(encoding="utf-8"))
    for table in _evaluation_tables(evaluation):
        wide(table).print(table)
    typer.echo(f"{evaluation['images_per_seed']} images for each of {len(evaluation['seeds'])} seeds")
    typer.echo(evaluation["verdict"])
    for name in FILES:
        typer.echo(f"wrote {out / name}")


def _moved(picture: Drawn) -> str:
    """How far guidance moved the output of each guided layer."""
    if picture.report is None:
        return "-"
    return ", ".join(f"{row['layer']} {percent(row['moved'])}" for row in picture.report.to_dict()["layers"])


def _evaluation_tables(evaluation: dict[str, Any]) -> Iterator[Table]:
    """For each mode: no guidance, CFG alone, the paper's settings, and the one chosen on other seeds."""
    rows = [row for row in evaluation["rows"] if _is_shown(row["setting"], evaluation["chosen"])]
    for mode in dict.fromkeys(row["setting"]["mode"] for row in rows):
        rows_of_mode = [row for row in rows if row["setting"]["mode"] == mode]
        measures = [name for name in _MEASURES if name in rows_of_mode[0]["measures"]]
        table = Table("guidance", *(_MEASURES[name] for name in measures), title=f"measured before, {mode}")
        for row in rows_of_mode:
            values = (row["measures"][name] for name in measures)
            table.add_row(_words(row["setting"]), *(f"{value['mean']:.2f} ± {value['spread']:.2f}" for value in values))
        yield table


def _is_shown(setting: dict[str, Any], chosen: dict[str, Any]) -> bool:
    by_paper = setting["cfg"] == 1.0 and setting["seg"] == _PAPER_SCALE and float(setting["sigma"]) in _PAPER_SIGMAS
    return not setting["seg"] or by_paper or setting == chosen


def _words(setting: dict[str, Any]) -> str:
    """A setting of the evaluation, such as ``SEG σ=inf scale 3``."""
    words = [f"CFG {setting['cfg']:g}"] if setting["cfg"] > 1 else []
    if setting["seg"]:
        words.append(f"SEG σ={float(setting['sigma']):g} scale {setting['seg']:g}")
    return " + ".join(words) or "none"
