# SPDX-License-Identifier: Apache-2.0
"""``docs/pipelines.md`` and its pictures: what a guided step costs, measured and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.approximations import table
from benchmarks.steps import HEADINGS, lines
from benchmarks.tables import markdown

_INTRODUCTION = """\
# What a guided step costs

`python -m benchmarks.readme` writes this page from `benchmarks/results/step/`, which `python -m benchmarks run --suite
step` measures; no number here is typed by hand.

Whole runs of stock pipelines take turns: without guidance, with classifier-free guidance (CFG), with diffusers' PAG
pipeline, with the official algorithm for SEG (every branch in full, blurs by a two-dimensional convolution, its own
loop with less around the denoiser than a pipeline has), and with `guide`. A step is what lies between two calls of the
pipeline's callback; a run's first step is left out. `x plain` is the median over rounds of a step's time over that of
the plain run in the same round, which is the one with CFG for runs with CFG. `x counted` is the same ratio of
floating-point operations, counted on a denoiser without data: what the time would be if all operations took the same.
A guided run has a time only if its latents are the official algorithm's, or for PAG those of diffusers' pipeline:
`error` is their relative distance."""

_COUNTED = """\
On Stable Diffusion XL's own configuration at 1024 x 1024, one step of a guided run has so many times the floating-point
operations of the plain one (`tests/diffusers/test_flops.py` holds them to the bound: everything after the inputs of
the first
perturbed attention, and nothing before it):"""

_NO_GPU = "**GPU: not measured.** No result file comes from a GPU."


_APPROXIMATIONS = """\
Off by default. `SEG(reuse=n)` computes the perturbed branch in every n-th step and takes its last difference in the
others, which cost what plain steps cost; `start` and `stop` leave guidance out of part of the run. What that costs in
quality depends on the model; this is the bundled one, without prompts, with the setting that its evaluation chose
(`python -m benchmarks approximations`):"""


def page(files: Mapping[str, dict[str, Any]], approximated: dict[str, Any] | None = None) -> str:
    """The whole page.

    Args:
        files: of ``benchmarks.steps``, by their stems.
        approximated: what ``benchmarks.approximations`` measured.
    """
    parts = [_INTRODUCTION]
    if files:
        parts += ["## Counted", _COUNTED, _counted(next(iter(files.values()))["sdxl_flops"])]
    if not any(found["environment"]["device_type"] == "cuda" for found in files.values()):
        parts.append(_NO_GPU)
    for stem, found in files.items():
        parts += [f"## {device(found)}", _about(found), f"![steps](../benchmarks/results/step/{stem}.png)"]
        parts.append(markdown(HEADINGS, lines(found)))
    if not files:
        parts.append("Not measured.")
    parts += ["## Approximations", _APPROXIMATIONS]
    parts.append("Not measured." if approximated is None else _approximated(approximated))
    return "\n\n".join(parts) + "\n"


def _approximated(found: dict[str, Any]) -> str:
    env = found["environment"]
    about = (
        f"{found['images_per_seed']} images for each of {len(found['seeds'])} seeds, {found['steps']} steps, "
        f"{found['dtype']}, {env['device']}, torch {env['torch']}, commit `{env['commit']}`; means and standard "
        f"deviations over seeds."
    )
    return f"{table(found)}\n\n{about}"


def device(found: Mapping[str, Any]) -> str:
    """Where a file was measured, in words."""
    env = found["environment"]
    return env["device"] + (f", {env['threads']} threads" if env["device_type"] == "cpu" else "")


def _about(found: Mapping[str, Any]) -> str:
    env = found["environment"]
    height, width = (8 * pixels for pixels in found["latent"])
    reduced = "a denoiser in SDXL's layout, with SDXL's number of layers at a fifth of its channels"
    model = "SDXL's configuration" if found["size"] == "sdxl" else reduced
    return (
        f"{model}, random weights, {found['dtype']}, {height} x {width} pixels, {found['rounds']} rounds of runs of "
        f"{found['steps']} steps; torch {env['torch']}, commit `{env['commit']}`."
    )


def _counted(counted: Mapping[str, float]) -> str:
    rows = []
    for name, flops in counted.items():
        against = "CFG" if name.startswith("CFG") else "no guidance"
        rows.append([name, f"{flops / 1e12:.2f}", f"{flops / counted[against]:.3f}"])
    return markdown(("step", "TFLOP", "x plain"), rows)


def counts(flops: Mapping[str, float]) -> str:
    """The README's sentence on counted operations."""
    finite, infinite = (flops[f"CFG + segkern mid sigma {sigma}"] / flops["CFG"] for sigma in ("10", "inf"))
    return (
        f"Counted on SDXL's own configuration at 1024 x 1024, a step with CFG and SEG in the middle block takes "
        f"{finite:.3f} times the floating-point operations of CFG alone at sigma 10 and {infinite:.3f} times at "
        f"infinity, where a third branch in full would take 1.5 times."
    )


def summary(found: Mapping[str, Any]) -> str:
    """The README's table of one file: CFG, the official algorithm and ours in the middle block."""
    rows = {row["way"]: row for row in found["rows"] if row["ms"] is not None}
    shown = []
    for sigma in ("3", "10", "inf"):
        ours, official = rows.get(f"CFG + segkern mid sigma {sigma}"), rows.get(f"CFG + official SEG sigma {sigma}")
        if ours is None or official is None or "CFG" not in rows:
            continue
        times = [row["ms"]["median"] for row in (rows["CFG"], official, ours)]
        shown.append([sigma, *(f"{ms:.0f} ms" for ms in times), f"{ours['ratio']['median']:.2f}",
                      f"{times[1] / times[2]:.2f}"])  # fmt: skip
    headings = ("sigma", "CFG alone", "CFG + official SEG", "CFG + segkern", "x CFG alone", "faster than official")
    return f"{device(found)}; {_about(found)}\n\n{markdown(headings, shown)}"


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Bars of measured ratios with their spread, and a mark where the count is."""
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if row["ratio"] is not None]
    figure = Figure(figsize=(11, 1.6 + 0.27 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, cfg in zip(panels, (False, True), strict=True):
        here = [row for row in rows if row["cfg"] == cfg][::-1]
        places = range(len(here))
        medians = [row["ratio"]["median"] for row in here]
        spreads = [_ends(here, medians)] if here else []
        colours = [_COLOURS[row["kind"]] for row in here]
        panel.barh(places, medians, color=colours, xerr=spreads[0] if spreads else None, capsize=2)
        known = [(row["counted"], place) for place, row in zip(places, here, strict=True) if row["counted"] is not None]
        panel.plot([x for x, _ in known], [y for _, y in known], "k|", markersize=11, markeredgewidth=2)
        panel.set_yticks(places, [row["way"].removeprefix("CFG + ") for row in here], fontsize=8)
        panel.set_xlabel(f"time of a step / time of {'CFG alone' if cfg else 'no guidance'}")
        panel.axvline(1.0, color="black", linestyle="--", linewidth=1)
        panel.grid(alpha=0.3, axis="x")
        panel.set_title("with CFG" if cfg else "without CFG", fontsize=10)
    env = found["environment"]
    figure.suptitle(
        f"Guided steps: measured (bars, 20th to 80th percentile) and counted (black marks)\n"
        f"{device(found)}, {found['size']}, torch {env['torch']}, commit {env['commit'] or 'unknown'}",
        fontsize=11,
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})


_COLOURS = {"plain": "#888888", "official": "#8c564b", "pag": "#e377c2", "segkern": "#1f77b4"}


def _ends(rows: Sequence[Mapping[str, Any]], medians: Sequence[float]) -> list[list[float]]:
    """Distances to the 20th and 80th percentile."""
    low = [max(0.0, m - row["ratio"]["p20"]) for m, row in zip(medians, rows, strict=True)]
    high = [max(0.0, row["ratio"]["p80"] - m) for m, row in zip(medians, rows, strict=True)]
    return [low, high]
