# SPDX-License-Identifier: Apache-2.0
"""Plots of recorded energies: maps over the token grid, curves over sigma and over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkern.analysis.report import chosen_steps, sigma_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

LAYERS_IN_A_SHEET = 6
_ALONE_IN_A_ROW = 3  # layers per row if there is one step
_NAMED_LAYERS = 10  # with more layers, a colour bar replaces the legend
_GAP = 1.0  # distance of 0 and infinity from the finite sigmas on the log2 axis


def map_files(layers: int) -> list[str]:
    """Return the file names of the sheets for this number of layers."""
    sheets = math.ceil(layers / LAYERS_IN_A_SHEET)
    return ["maps.png"] if sheets == 1 else [f"maps-{number}.png" for number in range(1, sheets + 1)]


def plot_maps(run: dict[str, Any], folder: Path, picture: Image | None = None) -> list[Path]:
    """Plot the energy of each query over the grid: rows are layers, with separate scales; columns are chosen steps.

    Args:
        run: The result of :func:`segkern.analysis.report.summary`.
        folder: Output folder of the sheets.
        picture: Generated image to show on the left.
    """
    layers = run["layers"]
    paths = [folder / name for name in map_files(len(layers))]
    for sheet, path in enumerate(paths):
        _sheet(layers[sheet * LAYERS_IN_A_SHEET : (sheet + 1) * LAYERS_IN_A_SHEET], run, picture, path)
    return paths


def _sheet(layers: Sequence[dict[str, Any]], run: dict[str, Any], picture: Image | None, path: Path) -> None:
    from matplotlib.figure import Figure

    steps = chosen_steps(run)
    height, width = layers[0]["grid"]
    side = 2.5
    across, down = side * min(1.6, max(0.6, width / height)), side * min(1.6, max(0.6, height / width))
    in_a_row = min(len(layers), 1 if len(steps) > 1 else _ALONE_IN_A_ROW)
    rows, first = math.ceil(len(layers) / in_a_row), int(picture is not None)
    columns = first + len(steps) * in_a_row
    size = across * columns + 1.1 * in_a_row + 1.1, (down + 0.45) * rows + 0.9
    figure = Figure(figsize=size, layout="compressed")
    grid = figure.add_gridspec(rows, columns)
    if picture is not None:
        panel = figure.add_subplot(grid[0, 0])
        panel.imshow(picture)
        panel.set_title("image", fontsize=11)
        panel.set_axis_off()
    for index, layer in enumerate(layers):
        row, place = divmod(index, in_a_row)
        maps = [layer["at"][str(step)]["map_by_query"] for step in steps]
        low, high = (pick(pick(map(pick, one)) for one in maps) for pick in (min, max))
        panels = []
        for column, (step, values) in enumerate(zip(steps, maps, strict=True)):
            panel = figure.add_subplot(grid[row, first + place * len(steps) + column])
            image = panel.imshow(values, cmap="turbo", vmin=low, vmax=high, interpolation="nearest")
            panel.set_title(f"{layer['name']}, step {step}", fontsize=11)
            panel.set_xlabel("token column" if row == rows - 1 else "")
            panel.set_ylabel("token row" if column == 0 else "")
            panels.append(panel)
        bar = figure.colorbar(image, ax=panels, pad=0.015)
        bar.set_label("energy (nats)")
    figure.suptitle(f"Energy of each query, mean over heads\n{_title(run)}", fontsize=12, parse_math=False)
    figure.savefig(path, dpi=110)


def plot_over_steps(run: dict[str, Any], path: Path) -> None:
    """Plot the mean energy of a layer's queries at every step, one curve per layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    panel = figure.subplots()
    layers = run["layers"]
    for layer, style in zip(layers, _styles(layers), strict=True):
        panel.plot(range(len(layer["energy"])), layer["energy"], **style)
    panel.set_xlabel("denoiser step (the first has the most noise)")
    panel.set_ylabel("mean energy of a query (nats)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    _name_layers(figure, [panel], layers)
    figure.suptitle(f"Energy of self-attention during a run\n{_title(run)}", fontsize=12, parse_math=False)
    figure.savefig(path, dpi=110)


def plot_over_sigma(run: dict[str, Any], path: Path) -> None:
    """Plot the effect of a blur on energy, variance and curvature, one row per chosen step, one curve per layer."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    steps, layers, sigmas = chosen_steps(run), run["layers"], run["sigmas"]
    figure = Figure(figsize=(18, 4.2 * len(steps) + 1.0), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1))
    panels = figure.subplots(len(steps), 4, squeeze=False)
    for step, row in zip(steps, panels, strict=True):
        for layer, style in zip(layers, _styles(layers), strict=True):
            at = layer["at"][str(step)]
            energy, variance = at["by_query"]["energy"], at["query_variance"]
            curvature = at["by_key"]["log_curvature"]
            _curve(row[0], sigmas, [value - energy[0] for value in energy], style)
            _curve(row[1], sigmas, [value / (variance[0] or 1.0) for value in variance], style)
            for panel, factor, line in ((row[2], "none", "-"), (row[3], "paper", "-"), (row[3], "chain", ":")):
                values = [value - curvature[factor][0] for value in curvature[factor]]
                _curve(
                    panel,
                    sigmas,
                    values,
                    {**style, "linestyle": line, "label": style["label"] if line == "-" else None},
                )
        names = (
            ("Mean energy of a query", "change from unblurred (nats)"),
            ("Variance of a key's logits", "ratio to unblurred"),
            ("log |det| of the Hessian of -lse", "change per logit (nats)"),
            ("log |det| with the blur's factor", "change per logit (nats)"),
        )
        for panel, (title, axis) in zip(row, names, strict=True):
            panel.set_title(f"{title}, step {step}", fontsize=11)
            panel.set_ylabel(axis)
            panel.axhline(0.0, color="black", linewidth=0.8)
            panel.grid(alpha=0.3)
            _sigma_axis(panel, sigmas)
        row[1].set_ylim(0.0, max(1.05, row[1].get_ylim()[1]))
    lines = (("-", "last panel: paper's factor b_ii"), (":", "chain rule's factor det(B)², -∞ at σ = ∞"))
    factors = [Line2D([], [], color="black", linestyle=line, label=text) for line, text in lines]
    _name_layers(figure, panels.flatten().tolist(), layers, factors)
    title = f"Effect of blurring the queries, boundary {run['boundary']}\n{_title(run)}"
    figure.suptitle(title, fontsize=13, parse_math=False)
    figure.savefig(path, dpi=110)


def _places(sigmas: Sequence[float]) -> list[float]:
    """Return positions of sigmas on a log2 axis, with 0 and infinity one step outside the finite sigmas."""
    powers = [math.log2(sigma) for sigma in sigmas if 0.0 < sigma < math.inf] or [0.0]
    return [
        min(powers) - _GAP if sigma == 0.0 else max(powers) + _GAP if math.isinf(sigma) else math.log2(sigma)
        for sigma in sigmas
    ]


def _curve(panel: Axes, sigmas: Sequence[float], values: Sequence[float], style: dict[str, Any]) -> None:
    """Plot finite values: a thick line between finite sigmas, a thin one to 0 and infinity."""
    points = sorted(zip(_places(sigmas), values, sigmas, strict=True))
    points = [point for point in points if math.isfinite(point[1])]
    inner = [point for point in points if 0.0 < point[2] < math.inf]
    places, heights, _ = zip(*points, strict=True)
    thin = {**style, "label": None, "linewidth": 0.8}
    panel.plot(places, heights, **{**thin, "marker": "o", "markersize": 4, "alpha": 0.7})
    if inner:
        places, heights, _ = zip(*inner, strict=True)
        panel.plot(places, heights, **{**style, "linewidth": 2.0})


def _sigma_axis(panel: Axes, sigmas: Sequence[float]) -> None:
    places = _places(sigmas)
    ticks: list[tuple[float, str]] = []
    for place, sigma in sorted(zip(places, sigmas, strict=True)):
        if not ticks or place - ticks[-1][0] > 0.3 or math.isinf(sigma):
            ticks.append((place, "none" if sigma == 0.0 else sigma_label(sigma)))
    panel.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    panel.set_xlabel("sigma (tokens)")


def _styles(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return line styles: contrasting colours for few layers, blue to red in execution order for many."""
    from matplotlib import colormaps

    if len(layers) <= _NAMED_LAYERS:
        colours = [colormaps["tab10"](index) for index in range(len(layers))]
    else:
        colours = [colormaps["turbo"](0.05 + 0.9 * index / (len(layers) - 1)) for index in range(len(layers))]
    return [{"color": colour, "label": f"layer {layer['name']}"} for colour, layer in zip(colours, layers, strict=True)]


def _name_layers(figure: Any, panels: list[Axes], layers: Sequence[dict[str, Any]], others: Sequence[Any] = ()) -> None:
    """Add a legend of the layers, or a colour bar if there are many, and of the other handles."""
    few = len(layers) <= _NAMED_LAYERS
    handles = [*(panels[0].get_legend_handles_labels()[0] if few else []), *others]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    if few:
        return
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    last = len(layers) - 1
    bar = figure.colorbar(
        ScalarMappable(Normalize(-last / 18, last * 19 / 18), colormaps["turbo"]), ax=panels, pad=0.01
    )
    ticks = sorted({round(last * part / 6) for part in range(7)})
    bar.set_ticks(ticks, labels=[layers[index]["name"] for index in ticks])
    bar.ax.set_ylim(0, last)
    bar.set_label("layer, in execution order")


def _title(run: dict[str, Any]) -> str:
    prompt = run["prompt"]
    asked = f'"{prompt if len(prompt) <= 48 else prompt[:45] + "..."}"' if prompt else "no prompt"
    return f"{run['model']}, {asked}, {run['width']} x {run['height']}, seed {run['seed']}"
