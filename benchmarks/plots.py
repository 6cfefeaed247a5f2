# SPDX-License-Identifier: Apache-2.0
"""Plots of a result file: time relative to plain attention over sigma, or cost of guided steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import CASES
from benchmarks.providers import PROVIDERS
from benchmarks.results import Result, Row, read_json
from benchmarks.results import read as read_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_MARKERS = "osD^vPX*<>hd"
_HIGHEST_RATIO = 2.0  # upper limit of the axis of attention ratios; larger ones are listed
_STEP_COLOURS = {"plain": "#888888", "official": "#8c564b", "pag": "#e377c2", "segkern": "#1f77b4"}
_REFERENCE = "fastest unblurred attention"


def rows_by_picture(stem: str, result: Result) -> dict[str, list[Row]]:
    """Return the rows with a time for each plot of a suite's result, by file name; one plot per dtype."""
    timed = [row for row in result["rows"] if row["reason"] is None]
    if len({row["sigma"] for row in timed if row["kind"] != "plain"}) < 2:
        return {}
    dtypes = dict.fromkeys(row["dtype"] for row in timed)
    return {f"{stem}-ratio-{dtype}.png": [row for row in timed if row["dtype"] == dtype] for dtype in dtypes}


def read(path: Path) -> dict[str, Any]:
    """Read a result file of a suite of calls, or of the suite of guided steps, which has a ``size``.

    Raises:
        ValueError: If it is any other file.
    """
    try:
        content = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = {}
    return content if "size" in content else read_result(path)


def write(stem: str, result: Result, folder: Path) -> list[Path]:
    """Write the plots of a result into a folder and return their paths."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    if "size" in result:
        return [_write_steps(result, folder / f"{stem}.png")]
    paths = []
    for name, rows in rows_by_picture(stem, result).items():
        figure = Figure(layout="constrained")
        draw_ratios(figure, rows)
        title = f"{result['suite']}: time relative to plain attention over sigma, {rows[0]['dtype']}"
        figure.suptitle(f"{title}\n{_where(result)}", fontsize=11)
        # No time and no version in the metadata, so the same file gives the same bytes with the same matplotlib.
        figure.savefig(folder / name, dpi=100, metadata={"Software": None})
        paths.append(folder / name)
    return paths


def _where(result: Result) -> str:
    env, quick = result["environment"], ", quick run: numbers are meaningless" if result.get("quick") else ""
    threads = f", {env['threads']} threads" if env["device_type"] == "cpu" else ""
    return f"{env['device']}{threads}, torch {env['torch']}, commit {env['commit'] or 'unknown'}{quick}"


def style(provider: str) -> dict[str, Any]:
    """Return a provider's colour and marker, equal in all plots. Approximations are dotted."""
    from matplotlib import colormaps

    place = list(PROVIDERS).index(provider) if provider in PROVIDERS else len(PROVIDERS)
    exact = provider not in PROVIDERS or PROVIDERS[provider].exact
    palettes = [colormaps[name] for name in ("tab10", "Dark2", "Set1")]
    strong = [palette(i) for palette in palettes for i in range(palette.N)]  # no pale colours
    return {
        "color": "black" if provider == "auto" else strong[place % len(strong)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": "-" if exact else ":",
        "markersize": 5,
        "linewidth": 2.2 if provider == "auto" else 1.2,
        "label": provider,
    }


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["provider"], []).append(row)
    return groups


def _panels(figure: Figure, count: int, height: float = 4.0) -> list[Axes]:
    columns = min(_COLUMNS, count)
    lines = math.ceil(count / columns)
    figure.set_size_inches(max(7.5, 5.2 * columns), height * lines + 1.6)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for panel in panels[count:]:
        panel.remove()
    return panels[:count]


def _label_first(panel: Axes, label: str) -> None:
    """Label the axis that the panels of a row share."""
    place = panel.get_subplotspec()
    if place is not None and place.is_first_col():
        panel.set_ylabel(label)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    named: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=9)


def draw_ratios(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw a panel for each layer: ratios of all providers over sigma, with their spread."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    panels = _panels(figure, len(cases))
    ratios = [row["ratio"]["median"] for row in rows if row["ratio"] and row["kind"] != "plain"]
    near_one = min(ratios) > 0.3  # true for attention; ratios of the blur alone span decades
    for panel, case in zip(panels, cases, strict=True):
        here = [row for row in rows if row["case"] == case and row["kind"] != "plain" and row["ratio"]]
        sigmas = sorted({row["sigma"] for row in here}, key=float)
        panel.axhline(1.0, color="black", linestyle="--", linewidth=1, label=_REFERENCE)
        for provider, points in _grouped(here).items():
            look = style(provider)
            for places, run in _unbroken(points, sigmas):
                panel.errorbar(places, [row["ratio"]["median"] for row in run], _bars(run), capsize=2, **look)
                look = look | {"label": None}
        panel.set_xticks(range(len(sigmas)), ["∞" if sigma == "inf" else sigma for sigma in sigmas])
        panel.set_xlabel("sigma of the blur, tokens")
        _label_first(panel, "time / time of unblurred attention")
        if near_one and min(ratios) < _HIGHEST_RATIO < max(ratios):
            panel.set_ylim(min(ratios) - 0.1, _HIGHEST_RATIO)
            panel.text(0.02, 0.98, _beyond(here), transform=panel.transAxes, va="top", fontsize=8)
        elif max(ratios) > 4 * min(ratios):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}" if max(ratios) < 30 * min(ratios) else "")
            panel.tick_params(axis="y", which="minor", labelsize=7)
        panel.set_title(_title(case, points_of=rows), fontsize=10)
        panel.grid(alpha=0.3, which="both")
    _legend(figure, panels)


def _beyond(rows: Sequence[Row]) -> str:
    """List the providers with ratios above the axis limit, and the range of their ratios."""
    lines = []
    for provider, points in _grouped(rows).items():
        ratios = [row["ratio"]["median"] for row in points]
        if max(ratios) > _HIGHEST_RATIO:
            lines.append(f"{provider}: {min(ratios):.2g} to {max(ratios):.2g}")
    return "\n".join(["beyond the scale:", *lines]) if lines else ""


def _unbroken(points: Sequence[Row], sigmas: Sequence[str]) -> list[tuple[list[int], list[Row]]]:
    """Return positions and rows of a line, split where a sigma has no time, so no line crosses a gap."""
    by_place = {sigmas.index(row["sigma"]): row for row in points}
    pieces: list[tuple[list[int], list[Row]]] = []
    for place in sorted(by_place):
        if not pieces or pieces[-1][0][-1] != place - 1:
            pieces.append(([], []))
        pieces[-1][0].append(place)
        pieces[-1][1].append(by_place[place])
    return pieces


def _bars(rows: Sequence[Row]) -> list[list[float]] | None:
    """Return distances to the 20th and 80th percentile, if the file has them."""
    if not all({"p20", "p80"} <= set(row["ratio"]) for row in rows):
        return None
    ratios = [row["ratio"] for row in rows]
    return [[max(0.0, r["median"] - r["p20"]) for r in ratios], [max(0.0, r["p80"] - r["median"]) for r in ratios]]


def _title(case: str, points_of: Sequence[Row]) -> str:
    row = next(row for row in points_of if row["case"] == case)
    label = CASES[case].label if case in CASES else f"{row['height']}x{row['width']} tokens, {row['heads']} heads"
    return f"{case}\n{label} of {row['head_dim']}, {row['batch'] - row['blurred']} plain + {row['blurred']} blurred"


def _write_steps(result: Result, path: Path) -> Path:
    """Draw bars of measured ratios of guided steps with their spread, and a mark at the counted ratio."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["ratio"] is not None]
    figure = Figure(figsize=(11, 1.6 + 0.27 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, cfg in zip(panels, (False, True), strict=True):
        here = [row for row in rows if row["cfg"] == cfg][::-1]
        places = range(len(here))
        medians = [row["ratio"]["median"] for row in here]
        colours = [_STEP_COLOURS[row["kind"]] for row in here]
        panel.barh(places, medians, color=colours, xerr=_bars(here) if here else None, capsize=2)
        known = [(row["counted"], place) for place, row in zip(places, here, strict=True) if row["counted"] is not None]
        panel.plot([x for x, _ in known], [y for _, y in known], "k|", markersize=11, markeredgewidth=2)
        panel.set_yticks(places, [row["way"].removeprefix("CFG + ") for row in here], fontsize=8)
        panel.set_xlabel(f"time of a step / time of {'CFG alone' if cfg else 'no guidance'}")
        panel.axvline(1.0, color="black", linestyle="--", linewidth=1)
        panel.grid(alpha=0.3, axis="x")
        panel.set_title("with CFG" if cfg else "without CFG", fontsize=10)
    title = f"Guided steps of {result['size']}: measured (bars, 20th to 80th percentile) and counted (black marks)"
    figure.suptitle(f"{title}\n{_where(result)}", fontsize=11)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return path
