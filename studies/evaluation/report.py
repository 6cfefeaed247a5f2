# SPDX-License-Identifier: Apache-2.0
"""Results of a study, with mean and spread over seeds, as JSON and as markdown."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.evaluation.settings import MODES, Setting

# Measure, heading and digits. An arrow shows the direction that is better.
Column = tuple[str, str, int]
COLUMNS: tuple[Column, ...] = (
    ("frechet_distance", "Fréchet ↓", 2),
    ("kernel_distance", "KID ↓", 3),
    ("precision", "precision ↑", 3),
    ("recall", "recall ↑", 3),
    ("caption_accuracy", "caption accuracy ↑", 3),
    ("distance_to_unguided", "distance to unguided", 3),
    ("training_distance", "distance to training images", 3),
    ("copies", "copies ↓", 3),
)
PAPER_SCALE = 3.0
# The paper uses sigma 10 on SDXL's 32x32 tokens; the bundled model has 16x16 tokens.
PAPER_SIGMAS = (5.0, math.inf)


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per setting, in the order of the cells, with mean and standard deviation over seeds."""
    groups: dict[Setting, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(setting_of(cell), []).append(cell)
    return [
        {
            "setting": setting.to_dict(),
            "seeds": len(group),
            "images": sum(cell["images"] for cell in group),
            "measures": mean_and_spread([cell["measures"] for cell in group]),
        }
        for setting, group in groups.items()
    ]


def mean_and_spread(measures: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of every measure, given one dictionary of measures per seed."""
    statistic = {}
    for name in measures[0]:
        values = [of_seed[name] for of_seed in measures]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        statistic[name] = {"mean": statistics.fmean(values), "spread": spread}
    return statistic


def write(path: Path, evaluation: dict[str, Any]) -> None:
    """Write the evaluation as JSON."""
    path.write_text(json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read an evaluation from a file that ``write`` wrote."""
    evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return evaluation


def modes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the modes of these rows."""
    return [mode for mode in MODES if any(row["setting"]["mode"] == mode for row in rows)]


def of_mode(rows: Sequence[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Return the rows of a mode."""
    return [row for row in rows if row["setting"]["mode"] == mode]


def cell(row: dict[str, Any], column: Column) -> str:
    """Return mean ± standard deviation over seeds as text."""
    name, _, digits = column
    value = row["measures"].get(name)
    return "" if value is None else f"{value['mean']:.{digits}f} ± {value['spread']:.{digits}f}"


def table(
    rows: Sequence[dict[str, Any]], drawings: dict[str, Any] | None = None, held_out: dict[str, Any] | None = None
) -> str:
    """Return a markdown table of rows of one mode. The paper's settings have a star.

    Args:
        rows: Rows of one mode.
        drawings: Measures of new compositions of trained drawings, for the first row.
        held_out: Measures of compositions of held-out drawings, for the second row.
    """
    shown = [column for column in COLUMNS if any(column[0] in row["measures"] for row in rows)]
    lines = ["| guidance | " + " | ".join(heading for _, heading, _ in shown) + " |"]
    lines.append("| --- |" + " ---: |" * len(shown))
    real = {"real drawings": drawings, "held-out drawings": held_out}
    named = [(name, {"measures": measures}) for name, measures in real.items() if measures]
    for name, row in [*named, *((describe(setting_of(row)), row) for row in rows)]:
        lines.append(f"| {name} | " + " | ".join(cell(row, column) for column in shown) + " |")
    return "\n".join(lines)


def short(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a short table: no guidance, CFG, the paper's settings and the chosen setting."""
    return [
        row
        for row in evaluation["rows"]
        if not row["setting"]["seg"] or is_papers(setting_of(row)) or row["setting"] == evaluation["chosen"]
    ]


def title(evaluation: dict[str, Any]) -> str:
    """Return one line on model, seeds and steps."""
    return (
        f"python -m studies.evaluation, model {evaluation['model']}: {evaluation['images_per_seed']} images for each "
        f"of {len(evaluation['seeds'])} seeds, {evaluation['steps']} steps; bars are standard deviations over seeds"
    )


def text(evaluation: dict[str, Any]) -> str:
    """Return the evaluation in markdown: one table per mode, the verdict, and the candidates."""
    rows = evaluation["rows"]
    parts = [title(evaluation)]
    for mode in modes(rows):
        parts += [
            f"## {mode.capitalize()}",
            table(of_mode(rows, mode), evaluation["drawings"], evaluation.get("held_out")),
        ]
    return "\n\n".join([*parts, "## The choice", evaluation["verdict"], table(evaluation["selection"])]) + "\n"


def describe(setting: Setting) -> str:
    """Return a short description of a setting, such as ``SEG σ=∞ scale 3 ★``."""
    words = [f"CFG {setting.cfg:g}"] if setting.cfg > 1 else []
    if setting.seg:
        sigma = "∞" if math.isinf(setting.sigma) else f"{setting.sigma:g}"
        words.append(f"SEG σ={sigma} scale {setting.seg:g}" + (" ★" if is_papers(setting) else ""))
    others = {"PAG": setting.pag, "SAG": setting.sag, "SLG": setting.slg, "TPG": setting.tpg}
    words += [f"{name} scale {scale:g}" for name, scale in others.items() if scale]
    if setting.layers not in ("", "mid"):
        words.append(f"in {setting.layers}")
    if (setting.start, setting.stop) != (0.0, 1.0) or setting.slg:
        words.append(f"steps {setting.start:g} to {setting.stop:g}")
    if setting.reuse > 1:
        words.append(f"reuse {setting.reuse}")
    return " ".join(words) or "none"


def is_papers(setting: Setting) -> bool:
    """Return True for the paper's recommendation: scale 3 with infinite sigma or sigma 10 on 32x32 tokens."""
    plain = Setting(setting.mode, 1.0, setting.seg, setting.sigma, "mid")
    return setting == plain and setting.seg == PAPER_SCALE and setting.sigma in PAPER_SIGMAS


def setting_of(row: dict[str, Any]) -> Setting:
    """Return the setting of a row or cell."""
    return Setting.from_dict(row["setting"])
