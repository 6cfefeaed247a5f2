# SPDX-License-Identifier: Apache-2.0
"""The trade-off that a study found, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.evaluation.report import describe, is_papers, modes, setting_of
from studies.evaluation.study import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(
    rows: Sequence[dict[str, Any]], path: Path, title: str, drawings: dict[str, dict[str, float]] | None = None
) -> None:
    """The trade-off as a picture: Frechet distance by scale, precision by recall, and captions by scale.

    A row of panels per mode; error bars are standard deviations over seeds, stars the paper's settings. Measures of
    real drawings, if given, are what a perfect model could reach.
    """
    from matplotlib.figure import Figure

    shown = modes(rows)
    figure = Figure(figsize=(15, 4.6 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 3, squeeze=False)
    for mode, (left, middle, right) in zip(shown, panels, strict=True):
        chosen = [row for row in rows if row["setting"]["mode"] == mode]
        _by_scale(left, chosen, "frechet_distance", drawings)
        _trade_off(middle, chosen, drawings)
        _by_scale(right, chosen, "caption_accuracy" if mode == "prompts" else "precision", drawings)
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


def _by_scale(
    panel: Axes, rows: Sequence[dict[str, Any]], measure: str, drawings: dict[str, dict[str, float]] | None
) -> None:
    if drawings:
        panel.axhline(drawings[measure]["mean"], color="tab:green", linestyle="-.", label="real drawings")
    plain = next(row for row in rows if setting_of(row).method == "none")
    mean, spread = plain["measures"][measure]["mean"], plain["measures"][measure]["spread"]
    panel.axhline(mean, color="black", linestyle="--", label="no guidance")
    panel.axhspan(mean - spread, mean + spread, color="black", alpha=0.12)
    for curve, points in curves(rows):
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


def _trade_off(panel: Axes, rows: Sequence[dict[str, Any]], drawings: dict[str, dict[str, float]] | None) -> None:
    if drawings:
        place = _place({"measures": drawings})
        panel.plot(*place, "P", color="tab:green", markersize=9, zorder=4)
        panel.annotate("real drawings", place, xytext=(-5, -12), textcoords="offset points", fontsize=8, ha="right")
    for row in rows:
        setting = setting_of(row)
        if not setting.seg:
            panel.plot(*_place(row), "kD" if setting.method == "none" else "ks", markersize=7, zorder=4)
            text = "no guidance" if setting.method == "none" else describe(setting)
            panel.annotate(text, _place(row), xytext=(5, 4), textcoords="offset points", fontsize=8)
    for curve, points in curves(rows):
        style = _style(curve)
        panel.plot(*zip(*map(_place, points), strict=True), **style)
        for row in points:
            if is_papers(setting_of(row)):
                panel.plot(*_place(row), "*", color=style["color"], markersize=15, zorder=5)
    panel.set_xlabel("Recall (diversity)")
    panel.set_ylabel("Precision (fidelity)")


def _place(row: dict[str, Any]) -> tuple[float, float]:
    return row["measures"]["recall"]["mean"], row["measures"]["precision"]["mean"]


def curves(rows: Sequence[dict[str, Any]]) -> list[tuple[Setting, list[dict[str, Any]]]]:
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
