# SPDX-License-Identifier: Apache-2.0
"""What a study found: mean and spread over seeds, as JSON and in markdown."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.evaluation.study import MODES, Setting

# Measure, heading, digits; the arrow says which way is better.
Column = tuple[str, str, int]
COLUMNS: tuple[Column, ...] = (
    ("frechet_distance", "Frechet ↓", 2),
    ("kernel_distance", "KID ↓", 3),
    ("precision", "precision ↑", 3),
    ("recall", "recall ↑", 3),
    ("caption_accuracy", "caption accuracy ↑", 3),
    ("distance_to_unguided", "distance to unguided", 3),
)
PAPER_SCALE = 3.0
# The paper's sigma 10 acts on SDXL's 32x32 tokens; the bundled model has 16x16 there.
PAPER_SIGMAS = (5.0, math.inf)


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every measure, a row per setting, in the order of the cells."""
    groups: dict[Setting, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(setting_of(cell), []).append(cell)
    rows = []
    for setting, group in groups.items():
        measures = mean_and_spread([cell["measures"] for cell in group])
        images = sum(cell["images"] for cell in group)
        rows.append({"setting": setting.to_dict(), "seeds": len(group), "images": images, "measures": measures})
    return rows


def mean_and_spread(found: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of every measure, of one dictionary of measures per seed."""
    measures = {}
    for name in found[0]:
        values = [one[name] for one in found]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        measures[name] = {"mean": statistics.fmean(values), "spread": spread}
    return measures


def write(path: Path, content: dict[str, Any]) -> None:
    """The whole evaluation as JSON."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The evaluation that ``write`` wrote."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def modes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The modes among these rows."""
    return [mode for mode in MODES if any(row["setting"]["mode"] == mode for row in rows)]


def columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    """The columns that these rows fill."""
    return [column for column in COLUMNS if any(column[0] in row["measures"] for row in rows)]


def cell(row: dict[str, Any], column: Column) -> str:
    """Mean ± standard deviation over seeds."""
    name, _, digits = column
    value = row["measures"].get(name)
    return "" if value is None else f"{value['mean']:.{digits}f} ± {value['spread']:.{digits}f}"


def table(rows: Sequence[dict[str, Any]], drawings: dict[str, Any] | None = None) -> str:
    """A markdown table of rows of one mode, the paper's settings marked with a star; real drawings first, if given."""
    shown = columns(rows)
    lines = ["| guidance | " + " | ".join(heading for _, heading, _ in shown) + " |"]
    lines.append("| --- |" + " ---: |" * len(shown))
    named = [("real drawings", {"measures": drawings})] if drawings else []
    for name, row in [*named, *((describe(setting_of(row)), row) for row in rows)]:
        lines.append(f"| {name} | " + " | ".join(cell(row, column) for column in shown) + " |")
    return "\n".join(lines)


def short(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows to show where there is little room: no guidance, CFG, the paper's settings and the chosen one."""
    return [
        row
        for row in found["rows"]
        if not row["setting"]["seg"] or is_papers(setting_of(row)) or row["setting"] == found["chosen"]
    ]


def title(found: dict[str, Any]) -> str:
    """One line on what was measured with."""
    return (
        f"python -m studies.evaluation, model {found['model']}: {found['images_per_seed']} images for each of "
        f"{len(found['seeds'])} seeds, {found['steps']} steps; bars are standard deviations over seeds, ★ as the paper "
        "recommends"
    )


def markdown(found: dict[str, Any]) -> str:
    """The whole evaluation as text: how it was made, a table per mode, what was chosen and on what."""
    where = f"{found['device']}, {found['threads']} threads, {found['dtype']}, torch {found['torch']}, diffusers "
    where += f"{found['diffusers']}, commit `{found['commit']}`, weights `{found['weights']}`"
    seeds = ", ".join(map(str, found["seeds"]))
    parts = [
        "# What guidance does to samples",
        f"{where}. {found['images_per_seed']} images for each of the seeds {seeds}, {found['steps']} steps of the "
        f"Euler sampler; mean ± standard deviation over seeds. Distances are to {found['reference']['count']} drawings "
        "that the model was not trained on, in features of the bundled classifier, divided by their standard "
        "deviation, so they compare with each other and with nothing else. Real drawings are as many fresh ones of the "
        "prompts: what a perfect model could reach. Sigma counts tokens of the model's own 16x16 grid; the paper's "
        "sigma 10 on SDXL's 32x32 is 5 here, so ★ marks scale 3 at sigma 5 and at infinity.",
    ]
    for mode in modes(found["rows"]):
        rows = [row for row in found["rows"] if row["setting"]["mode"] == mode]
        parts += [f"## {mode.capitalize()}", table(rows, found["drawings"])]
    if found["chosen"]:
        tried = ", ".join(map(str, found["selection_seeds"]))
        parts += ["## The choice", found["verdict"], f"Chosen by the least Frechet distance on seed {tried}, among:"]
        parts.append(table(found["selection"]))
    return "\n\n".join(parts) + "\n"


def describe(setting: Setting) -> str:
    """A setting in few words, such as ``SEG σ=∞ scale 3 ★``."""
    words = []
    if setting.cfg > 1:
        words.append(f"CFG {setting.cfg:g}")
    if setting.seg:
        words.append(f"SEG σ={_sigma(setting.sigma)} scale {setting.seg:g}" + (" ★" if is_papers(setting) else ""))
        if setting.layers != "mid":
            words.append(f"in {setting.layers}")
        if (setting.start, setting.stop) != (0.0, 1.0):
            words.append(f"from {setting.start:g} to {setting.stop:g} of the run")
        if setting.reuse > 1:
            words.append(f"branch at every {setting.reuse}. step")
    words += [f"{name} scale {scale:g}" for name, scale in (("PAG", setting.pag), ("SAG", setting.sag)) if scale]
    return " ".join(words) or "none"


def is_papers(setting: Setting) -> bool:
    """Whether the paper recommends it: scale 3, sigma 10 of 32x32 tokens or infinity."""
    plain = Setting(setting.mode, 1.0, setting.seg, setting.sigma, "mid")
    return setting == plain and setting.seg == PAPER_SCALE and setting.sigma in PAPER_SIGMAS


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting that a row or cell belongs to."""
    return Setting.from_dict(row["setting"])


def _sigma(sigma: float) -> str:
    return "∞" if math.isinf(sigma) else f"{sigma:g}"
