# SPDX-License-Identifier: Apache-2.0
"""Count how often the statements about attention's energy hold in the bundled model, and by how much.

``python -m benchmarks energy`` writes ``benchmarks/results/energy/``: ``statements.json``, counted in float64 over
every head of every self-attention layer at a few steps of several runs, and ``energy.json`` with
``picture.png``, the output of ``segkern energy`` for one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import machine
from benchmarks.results import RESULTS, write_json
from segkern.analysis import plots, report
from segkern.analysis.energy import OverSigma
from segkern.generation.demo import PROMPTED
from segkern.generation.drawing import ImageRequest, draw, image_metadata
from segkern.generation.loading import find_model, load_pipeline, quiet_libraries
from segkern.generation.pictures import save

FOLDER = RESULTS / "energy"
DOCS = Path(__file__).parents[1] / "docs"
BOUNDARIES = ("reflect", "symmetric", "circular")
SIGMAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf)
PROMPTS = (*(subject.prompt for subject in PROMPTED[:3]), "")
_STEPS, _AT, _SEED, _CFG = 20, (0, 5, 10, 15, 19), 1, 2.0
_ROUNDING = 1e-9  # relative to the compared values

_Cells = list[tuple[OverSigma, OverSigma]]


def measure(folder: Path = FOLDER, quick: bool = False, tell: Callable[[str], None] = lambda name: None) -> None:
    """Write both files and the image, and, for the committed folder, the plots of docs/energy.md.

    Args:
        folder: Output folder.
        quick: Whether to use one prompt and two steps, which only shows that everything runs.
        tell: Called with the name of the current measurement.
    """
    from segkern.integrations.diffusers import record_energy

    quiet_libraries()
    prompts, steps, at_steps = (PROMPTS[:1], 2, (0, 1)) if quick else (PROMPTS, _STEPS, _AT)
    source = find_model("demo")
    pipe = load_pipeline(source, torch.float32, torch.device("cpu"))
    statements: dict[str, Any] = {"environment": machine.described(torch.device("cpu")), "model": source.name}
    statements |= {"prompts": list(prompts), "steps": steps, "at_steps": list(at_steps)}
    statements |= {"guidance_scale": _CFG, "seed": _SEED, "sigmas": list(SIGMAS), "boundaries": {}}
    for boundary in BOUNDARIES:
        tell(f"boundary {boundary}")
        with record_energy(pipe, None, SIGMAS, at_steps, boundary=boundary, dtype=torch.float64) as recorder:
            generator = torch.Generator("cpu").manual_seed(_SEED)
            pipe(list(prompts), num_inference_steps=steps, guidance_scale=_CFG, generator=generator)
        cells = [(r.by_query, r.by_key) for r in recorder.records if r.by_key is not None]
        statements["boundaries"][boundary] = count(cells)
    statements["layers"] = [layer.name for layer in recorder.layers]
    write_json(folder / "statements.json", report.json_values(statements))

    tell("one run")
    request = ImageRequest(PROMPTED[0].prompt, "", 64, 64, _SEED, steps, _CFG)
    with record_energy(pipe, None, SIGMAS, (0, steps // 2, steps - 1)) as recorder:
        picture = draw(pipe, request, ()).image
    details = image_metadata(source, request, (), torch.float32, pipe.scheduler)
    report.write(folder / "energy.json", report.summary(recorder, details, "reflect"))
    save(picture, folder / "picture.png", details)
    plot(folder, DOCS if folder == FOLDER else folder)


def plot(folder: Path, out: Path) -> None:
    """Write the plots of docs/energy.md from the files in a folder."""
    run = report.read(folder / "energy.json")
    with Image.open(folder / "picture.png") as picture:
        (sheet,) = plots.plot_maps(run, out, picture)
    sheet.replace(out / "energy-maps.png")
    plots.plot_over_sigma(run, out / "energy-over-sigma.png")
    plots.plot_over_steps(run, out / "energy-over-steps.png")


def count(cells: _Cells) -> dict[str, Any]:
    """Count, over every head of every sample in every record, how often a statement holds by sigma; median changes.

    The first sigma of a record is 0. There is one number for each of the other sigmas.
    """
    by_query, by_key = (_joined([cell[cut] for cell in cells], "energy") for cut in (0, 1))
    # [sigmas, cells, queries]
    queries = torch.cat([cell[0].energies.flatten(1, 2) for cell in cells], dim=1)
    within = _joined([cell[0] for cell in cells], "query_variance")
    tokens = queries.shape[2]
    counts: dict[str, Any] = {
        "cells": queries.shape[1],
        "energy_by_query_rises": _share(_above(by_query[1:], by_query[:1])),
        "energy_by_key_rises": _share(_above(by_key[1:], by_key[:1])),
        "a_querys_own_rises": _share(_above(queries[1:], queries[:1]).flatten(1)),
        "energy_rise": _median((by_query[1:] - by_query[:1]) / tokens),
        "variance_left": _median(within[1:] / within[:1]),
    }
    for factor in ("none", "paper", "chain"):
        values = torch.cat([cell[1].log_curvature[factor].flatten(1) for cell in cells], dim=1)
        change = (values[1:] - values[:1]) / tokens**2
        counts[f"determinant_{factor}"] = {"falls": _share(change < 0), "change": _median(change)}
    return counts


def _joined(cuts: list[OverSigma], name: str) -> torch.Tensor:
    """Return a quantity with one value per head, as ``[sigmas, cells]``."""
    return torch.cat([getattr(cut, name).flatten(1) for cut in cuts], dim=1)


def _above(later: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    return later >= earlier - _ROUNDING * earlier.abs()


def _share(holds: torch.Tensor) -> list[float]:
    return [float(value) for value in holds.double().mean(dim=1)]


def _median(values: torch.Tensor) -> list[float]:
    return [float(value) for value in values.median(dim=1).values]
