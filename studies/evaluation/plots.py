# SPDX-License-Identifier: Apache-2.0
"""Plots of an evaluation: quality over the guidance scale, and fidelity against diversity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.evaluation.report import describe, modes, of_mode, setting_of, title
from studies.evaluation.settings import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Measures = dict[str, dict[str, float]]


def plot(evaluation: dict[str, Any], path: Path) -> None:
    """Plot Frechet distance by scale, precision by recall, and captions by scale, in one row of panels per mode.

    Error bars are standard deviations over seeds. A perfect model could reach the values of the real drawings.
    """
    from matplotlib.figure import Figure

    rows, drawings = evaluation["rows"], evaluation["drawings"]
    figure = Figure(figsize=(15, 4.6 * len(modes(rows))), layout="constrained")
    panels = figure.subplots(len(modes(rows)), 3, squeeze=False)
    for mode, (left, middle, right) in zip(modes(rows), panels, strict=True):
        shown = of_mode(rows, mode)
        _by_scale(left, shown, "frechet_distance", drawings)
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
        _trade_off(middle, shown, drawings)
        _by_scale(right, shown, "caption_accuracy" if mode == "prompts" else "precision", drawings)
        left.set_title(f"{mode}: distance from real drawings (lower is better)")
        middle.set_title("fidelity against diversity (upper right is better)")
        right.set_title("captions (higher is better)" if mode == "prompts" else "fidelity (higher is better)")
    labelled: dict[str, Any] = {}
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        handles, labels = panel.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4)
    figure.suptitle(title(evaluation))
    figure.savefig(path, dpi=110)


def _by_scale(panel: Axes, rows: Sequence[dict[str, Any]], measure: str, drawings: Measures) -> None:
    panel.axhline(drawings[measure]["mean"], color="tab:green", linestyle="-.", label="real drawings")
    plain = next(row for row in rows if setting_of(row).method == "none")
    mean, spread = plain["measures"][measure]["mean"], plain["measures"][measure]["spread"]
    panel.axhline(mean, color="black", linestyle="--", label="no guidance")
    panel.axhspan(mean - spread, mean + spread, color="black", alpha=0.12)
    for curve, points in curves(rows):
        scales = [setting_of(row).seg for row in points]
        means, spreads = ([row["measures"][measure][name] for row in points] for name in ("mean", "spread"))
        panel.errorbar(scales, means, spreads, capsize=2, **_style(curve))
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("SEG scale")
    panel.set_ylabel(measure.replace("_", " ").capitalize())


def _trade_off(panel: Axes, rows: Sequence[dict[str, Any]], drawings: Measures) -> None:
    points = [("real drawings", "P", drawings)]
    points += [
        (describe(setting_of(row)).replace("none", "no guidance"), "D", row["measures"])
        for row in rows
        if not setting_of(row).seg
    ]
    for text, marker, measures in points:
        panel.plot(*_place(measures), marker, color="tab:green" if marker == "P" else "black", zorder=4)
        panel.annotate(text, _place(measures), xytext=(5, 4), textcoords="offset points", fontsize=8)
    for curve, curve_rows in curves(rows):
        panel.plot(*zip(*(_place(row["measures"]) for row in curve_rows), strict=True), **_style(curve))
    panel.set_xlabel("Recall (diversity)")
    panel.set_ylabel("Precision (fidelity)")


def _place(measures: Measures) -> tuple[float, float]:
    return measures["recall"]["mean"], measures["precision"]["mean"]


def curves(rows: Sequence[dict[str, Any]]) -> list[tuple[Setting, list[dict[str, Any]]]]:
    """Group the rows that differ only in the scale of SEG, by increasing scale, under the setting with scale 1."""
    groups: dict[Setting, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: setting_of(row).seg):
        setting = setting_of(row)
        if setting.seg:
            groups.setdefault(replace(setting, seg=1.0), []).append(row)
    order = sorted(groups, key=lambda curve: (curve.layers != "mid", curve.cfg, curve.sigma))
    return [(curve, groups[curve]) for curve in order]


def _style(curve: Setting) -> dict[str, Any]:
    """Return one colour per sigma, from light to dark; dotted with CFG, dashed for other layers or ranges of steps."""
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
