# SPDX-License-Identifier: Apache-2.0
"""Diagrams of the documentation: ``python -m benchmarks.diagrams`` writes ``docs/diagrams``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from segkern.core.coarse_queries import points
from segkern.core.gaussian import blur_reach

FOLDER = Path(__file__).parents[1] / "docs" / "diagrams"

INK, FAINT, PLAIN, BLURRED, OTHER = "#1a1a1a", "#777777", "#dfe6f5", "#f6c9a3", "#cfe8d5"


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """Axes in which a unit is the same both ways, without frame."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, colour: str = PLAIN) -> None:
    """A box with its middle at (x, y)."""
    corner = x - width / 2, y - height / 2
    shape = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec=INK, lw=0.9)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow, its text beside the middle of it."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.9, "shrinkA": 0, "shrinkB": 0})
    if text:
        level = start[1] == end[1]
        x, y = (start[0] + end[0]) / 2 + (0.0 if level else 0.12), (start[1] + end[1]) / 2 + (0.18 if level else 0.0)
        axes.text(x, y, text, fontsize=8, color=FAINT, va="center", ha="center" if level else "left")


def cells(axes: Any, rows: int, columns: int, colour: Callable[[int, int], str], x: float = 0, y: float = 0) -> None:
    """A grid of tokens, its first one at the upper left."""
    for row in range(rows):
        for column in range(columns):
            corner = x + column, y - row - 1
            axes.add_patch(Rectangle(corner, 1, 1, fc=colour(row, column), ec="white", lw=0.8))


def how_it_works() -> Figure:
    """One guided step."""
    figure, axes = canvas(8.2, 3.1)
    box(axes, 0.9, 2.0, 1.6, 0.9, "noisy image\nand prompt")
    box(axes, 3.7, 3.0, 2.6, 0.9, "denoiser")
    box(axes, 3.7, 1.0, 2.6, 0.9, "denoiser, queries blurred\nin some layers", BLURRED)
    box(axes, 7.9, 2.0, 2.2, 0.9, "c + scale · (c − p)", OTHER)
    box(axes, 10.9, 2.0, 1.9, 0.9, "less noisy\nimage")
    arrow(axes, (1.7, 2.2), (2.4, 2.9))
    arrow(axes, (1.7, 1.8), (2.4, 1.1))
    arrow(axes, (5.0, 3.0), (6.8, 2.2))
    arrow(axes, (5.0, 1.0), (6.8, 1.8))
    arrow(axes, (9.0, 2.0), (9.95, 2.0), "")
    axes.text(5.6, 2.95, "prediction c", fontsize=8, color=FAINT)
    axes.text(5.6, 0.95, "prediction p", fontsize=8, color=FAINT)
    axes.set_xlim(0, 12)
    axes.set_ylim(0.3, 3.6)
    return figure


def prologue() -> Figure:
    """A tile of queries, what it reads, and what becomes of it."""
    rows, columns, block, sigma = 12, 16, 32, 1.0
    first = 4 * columns + 8  # where the tile begins
    reach = blur_reach(sigma, rows, "reflect")
    touched = range(first // columns, (first + block - 1) // columns + 1)

    def colour(row: int, column: int) -> str:
        if first <= row * columns + column < first + block:
            return BLURRED
        return "#b9c9ee" if touched[0] - reach <= row <= touched[-1] + reach else PLAIN

    figure, axes = canvas(9.2, 3.7)
    cells(axes, rows, columns, colour, y=rows)
    axes.text(0, -0.9, f"{rows} x {columns} tokens of one sample and head", fontsize=8, color=FAINT)
    axes.text(0, rows + 0.5, f"queries: a tile of {block}, and the rows within reach at sigma {sigma:g}", fontsize=9)
    steps = (
        ("1  sum source rows vertically,\nfloat32 multiply-adds", PLAIN),
        ("2  one small product with the\nhorizontal weights", PLAIN),
        ("3  round once to the input's dtype;\nthe blurred tile stays in registers", BLURRED),
        ("4  walk over tiles of keys and values,\nonline softmax", OTHER),
        ("5  divide by the row sum,\nwrite the tile of the output", OTHER),
    )
    for index, (text, fill) in enumerate(steps):
        y = rows - 0.9 - index * 2.7
        box(axes, 26.5, y, 13.5, 2.0, text, fill)
        if index:
            arrow(axes, (26.5, y + 1.7), (26.5, y + 1.0))
    arrow(axes, (columns + 0.3, 7), (19.6, rows - 0.9))
    axes.set_xlim(-0.2, 33.6)
    axes.set_ylim(-1.4, rows + 1.4)
    return figure


def separable() -> Figure:
    """The two places where queries are blurred."""
    figure, axes = canvas(8.6, 2.4)
    before = (
        ("blur along\nthe width", BLURRED, 2.4),
        ("blur along\nthe height", BLURRED, 2.4),
        ("attention", OTHER, 3.6),
    )
    here = (("attention: every tile blurs its own queries", BLURRED, 9.0),)
    ways = (("in the prologue", here), ("before", before))
    for index, (name, launches) in enumerate(ways):
        y = 2.5 - index * 1.5
        axes.text(0.0, y, name, va="center", fontsize=9)
        x = 3.1
        for text, fill, width in launches:
            box(axes, x + width / 2, y, width, 1.0, text, fill)
            x += width + 0.3
    text = "programs of a launch from left to right; a gap is a launch that waits for the one before"
    axes.text(3.1, 0.15, text, fontsize=8, color=FAINT)
    axes.set_xlim(0, 12.4)
    axes.set_ylim(0, 3.2)
    return figure


def routes() -> Figure:
    """Which kernels serve which samples."""
    figure, axes = canvas(9.0, 4.0)
    box(axes, 5.6, 6.2, 4.4, 0.7, "samples of a batch, a sigma each")
    tests = (
        (
            "sigma infinite,\nand a mask, if any, the same for all queries?",
            "one row a head, keys split\nover programs; expanded",
        ),
        (
            "none of the others blurred,\nand too few rows to fill the device?",
            "keys split over programs,\nshares combined",
        ),
        (
            "narrower than 8 tokens, or the separable\nblur estimated to be cheaper?",
            "blurred in the prologue\nof attention",
        ),
    )
    arrow(axes, (5.6, 5.85), (5.6, 5.35))
    for index, (question, answer) in enumerate(tests):
        y = 4.9 - 1.4 * index
        box(axes, 5.6, y, 5.4, 0.9, question)
        last = index == 2
        word = "no" if last else "yes"
        arrow(axes, (8.3, y), (9.5, y), word)
        box(axes, 11.6, y, 4.2, 0.9, answer, BLURRED if last else OTHER)
        arrow(axes, (5.6, y - 0.45), (5.6, y - 0.95), "yes" if last else "no")
    box(axes, 5.6, 0.7, 5.4, 0.9, "separable blur, then\nattention of its result", BLURRED)
    axes.set_xlim(2.6, 13.9)
    axes.set_ylim(0.1, 6.7)
    return figure


def coarse() -> Figure:
    """Points of coarse queries."""
    rows, columns, stride = 13, 17, 4

    def at(length: int) -> Sequence[int]:
        count = -(-(length - 1) // stride) + 1
        return [round(float(p)) for p in points(length, count, "reflect")]

    where = {(row, column) for row in at(rows) for column in at(columns)}
    figure, axes = canvas(7.6, 3.2)
    cells(axes, rows, columns, lambda r, c: BLURRED if (r, c) in where else PLAIN, y=rows)
    axes.text(0, rows + 0.6, f"query_stride={stride}: {len(where)} of {rows * columns} rows", fontsize=9)
    texts = (
        "S: blurred queries at the points",
        "attention of those rows alone,\nevery key",
        "P: outputs and log-sum-exp\nbetween the points, by waves",
    )
    for index, text in enumerate(texts):
        y = rows - 1.5 - index * 4.6
        box(axes, 27.5, y, 15, 3.0, text, (PLAIN, OTHER, PLAIN)[index])
        if index:
            arrow(axes, (27.5, y + 3.1), (27.5, y + 1.5))
    axes.set_xlim(-0.2, 35.4)
    axes.set_ylim(-0.6, rows + 1.6)
    return figure


def branches() -> Figure:
    """Where the perturbed branch joins the batch."""
    figure, axes = canvas(9.0, 2.9)
    parts = (
        ("down blocks", 2.9),
        ("resnet", 1.2),
        ("first perturbed\ntransformer block", 2.2),
        ("rest of\nmid", 1.2),
        ("up blocks", 2.9),
    )
    rows = ("u", "c", "p")
    x = 0.8
    for index, (name, width) in enumerate(parts):
        for row, of in enumerate(rows):
            y = 2.4 - row * 0.62
            if of == "p" and index < 2:
                continue
            colour = BLURRED if of == "p" else PLAIN
            axes.add_patch(Rectangle((x, y - 0.25), width, 0.5, fc=colour, ec=INK, lw=0.9))
        axes.text(x + width / 2, 3.15, name, ha="center", va="center", fontsize=9)
        x += width + 0.1
    for row, of in enumerate(rows):
        axes.text(0.45, 2.4 - row * 0.62, of, ha="center", va="center", fontsize=10)
    start = 0.8 + 2.9 + 0.1 + 1.2 + 0.1
    arrow(axes, (start - 0.9, 1.76), (start - 0.02, 1.2))
    axes.text(start - 1.2, 1.12, "a copy of c joins here", fontsize=8, color=FAINT, ha="right")
    axes.text(0.8, 0.45, "u: negative prompt    c: prompt    p: prompt, queries blurred", fontsize=8, color=FAINT)
    axes.set_xlim(0, x + 0.1)
    axes.set_ylim(0.2, 3.5)
    return figure


DIAGRAMS = {
    "how-it-works": how_it_works,
    "prologue": prologue,
    "places": separable,
    "routes": routes,
    "coarse": coarse,
    "branches": branches,
}


def main() -> None:
    """Draw all of them."""
    FOLDER.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "segkern", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        for name, draw in DIAGRAMS.items():
            draw().savefig(FOLDER / f"{name}.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
