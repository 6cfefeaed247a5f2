# SPDX-License-Identifier: Apache-2.0
"""What a study found: mean and spread over seeds, as JSON, as a markdown table and as a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkern.evaluation.study import MODES, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
        groups.setdefault(Setting.from_dict(cell["setting"]), []).append(cell)
    rows = []
    for setting, group in groups.items():
        names = group[0]["measures"]
        measures = {name: _mean_and_spread([cell["measures"][name] for cell in group]) for name in names}
        images = sum(cell["images"] for cell in group)
        rows.append({"setting": setting.to_dict(), "seeds": len(group), "images": images, "measures": measures})
    return rows


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


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A markdown table of rows of one mode, the paper's settings marked with a star."""
    shown = columns(rows)
    lines = ["| guidance | " + " | ".join(heading for _, heading, _ in shown) + " |"]
    lines.append("| --- |" + " ---: |" * len(shown))
    for row in rows:
        cells = [cell(row, column) for column in shown]
        lines.append(f"| {describe(setting_of(row))} | " + " | ".join(cells) + " |")
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
        f"segkern evaluate, model {found['model']}: {found['images_per_seed']} images for each of "
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
        "that the model was not trained on, in features of the bundled classifier, so they compare with each other and "
        "with nothing else. Sigma counts tokens of the model's own 16x16 grid; the paper's sigma 10 on SDXL's 32x32 "
        "is 5 here, so ★ marks scale 3 at sigma 5 and at infinity.",
    ]
    for mode in modes(found["rows"]):
        rows = [row for row in found["rows"] if row["setting"]["mode"] == mode]
        parts += [f"## {mode.capitalize()}", table(rows)]
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
    return " ".join(words) or "none"


def is_papers(setting: Setting) -> bool:
    """Whether the paper recommends it: scale 3, sigma 10 of 32x32 tokens or infinity."""
    plain = Setting(setting.mode, 1.0, setting.seg, setting.sigma, "mid")
    return setting == plain and setting.seg == PAPER_SCALE and setting.sigma in PAPER_SIGMAS


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """The trade-off as a picture: Frechet distance by scale, precision by recall, and captions by scale.

    A row of panels per mode; error bars are standard deviations over seeds, stars the paper's settings.
    """
    from matplotlib.figure import Figure

    shown = modes(rows)
    figure = Figure(figsize=(15, 4.6 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 3, squeeze=False)
    for mode, (left, middle, right) in zip(shown, panels, strict=True):
        chosen = [row for row in rows if row["setting"]["mode"] == mode]
        _by_scale(left, chosen, "frechet_distance")
        _trade_off(middle, chosen)
        _by_scale(right, chosen, "caption_accuracy" if mode == "prompts" else "precision")
        for panel in (left, middle, right):
            panel.grid(alpha=0.3)
        left.set_title(f"{mode}: distance from real drawings (lower is better)")
        middle.set_title("fidelity against diversity (upper right is better)")
        right.set_title("captions (higher is better)" if mode == "prompts" else "fidelity (higher is better)")
    named: dict[str, Any] = {}
    for panel in panels[:, 0]:
        handles, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _by_scale(panel: Axes, rows: Sequence[dict[str, Any]], measure: str) -> None:
    plain = next(row for row in rows if setting_of(row).method == "none")
    mean, spread = plain["measures"][measure]["mean"], plain["measures"][measure]["spread"]
    panel.axhline(mean, color="black", linestyle="--", label="no guidance")
    panel.axhspan(mean - spread, mean + spread, color="black", alpha=0.12)
    for curve, points in _curves(rows):
        style = _style(curve)
        scales = [setting_of(row).seg for row in points]
        values = [row["measures"][measure] for row in points]
        means, spreads = ([value[name] for value in values] for name in ("mean", "spread"))
        panel.errorbar(scales, means, spreads, capsize=2, **style)
        for row, scale, height in zip(points, scales, means, strict=True):
            if is_papers(setting_of(row)):
                panel.plot(scale, height, "*", color=style["color"], markersize=15, zorder=5)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("SEG scale")
    panel.set_ylabel(measure.replace("_", " ").capitalize())
    if measure == "frechet_distance":
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")


def _trade_off(panel: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        setting = setting_of(row)
        if not setting.seg:
            panel.plot(*_place(row), "kD" if setting.method == "none" else "ks", markersize=7, zorder=4)
            text = "no guidance" if setting.method == "none" else describe(setting)
            panel.annotate(text, _place(row), xytext=(5, 4), textcoords="offset points", fontsize=8)
    for curve, points in _curves(rows):
        style = _style(curve)
        panel.plot(*zip(*map(_place, points), strict=True), **style)
        for row in points:
            if is_papers(setting_of(row)):
                panel.plot(*_place(row), "*", color=style["color"], markersize=15, zorder=5)
    panel.set_xlabel("Recall (diversity)")
    panel.set_ylabel("Precision (fidelity)")


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting that a row or cell belongs to."""
    return Setting.from_dict(row["setting"])


def _place(row: dict[str, Any]) -> tuple[float, float]:
    return row["measures"]["recall"]["mean"], row["measures"]["precision"]["mean"]


def _curves(rows: Sequence[dict[str, Any]]) -> list[tuple[Setting, list[dict[str, Any]]]]:
    """Rows that differ in SEG's scale alone, by rising scale, under a setting that stands for all of them."""
    found: dict[Setting, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: setting_of(row).seg):
        setting = setting_of(row)
        if setting.seg:
            found.setdefault(replace(setting, seg=1.0), []).append(row)
    order = sorted(found, key=lambda curve: (curve.layers != "mid", curve.cfg, curve.sigma))
    return [(curve, found[curve]) for curve in order]


def _style(curve: Setting) -> dict[str, Any]:
    """One colour per sigma, from light to dark; dotted with CFG, dashed in other layers or in a part of the run."""
    from matplotlib import colormaps

    usual = (curve.layers, curve.start, curve.stop) == ("mid", 0.0, 1.0)
    place = 1.0 if math.isinf(curve.sigma) else min(0.85, math.log2(1 + curve.sigma) / 4.2)
    return {
        "color": colormaps["viridis_r"](0.1 + 0.9 * place),
        "linestyle": ":" if curve.cfg > 1 else "-" if usual else "--",
        "marker": "o",
        "markersize": 4,
        "label": describe(curve).replace(" scale 1", ""),
    }


def _sigma(sigma: float) -> str:
    return "∞" if math.isinf(sigma) else f"{sigma:g}"


def _mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}
