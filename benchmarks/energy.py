# SPDX-License-Identifier: Apache-2.0
"""How often the statements about energy hold in a real model, and by how much: the bundled one.

``python -m benchmarks energy`` writes ``benchmarks/results/energy/``: ``statements.json``, counted over every head of
every self-attention layer in a few steps of several runs, in float64; and ``energy.json`` with ``picture.png``, what
``segkern energy`` writes of one run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.results import RESULTS
from segkern.analysis import report
from segkern.analysis.energy import OverSigma
from segkern.analysis.report import read
from segkern.generation.drawing import Job, describe, draw
from segkern.generation.loading import find_model, load_pipeline, quiet_libraries
from segkern.generation.pictures import save

FOLDER = RESULTS / "energy"
BOUNDARIES = ("reflect", "symmetric", "circular")
SIGMAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf)
PROMPTS = ("a large red ring", "a small blue square above a large green circle", "four yellow stars in a row", "")
_STEPS, _AT, _SEED, _CFG = 20, (0, 5, 10, 15, 19), 1, 2.0
_ROUNDING = 1e-9  # relative to what is compared

_Cells = list[tuple[OverSigma, OverSigma]]


def measure(tell: Callable[[str], None] = lambda name: None, folder: Path = FOLDER) -> dict[str, Any]:
    """Both files and the picture; returns what is in the first."""
    from segkern.integrations.diffusers import record_energy

    quiet_libraries()
    source = find_model("demo")
    pipe = load_pipeline(source, torch.float32, torch.device("cpu"))
    found: dict[str, Any] = {"environment": machine.described(torch.device("cpu")), "model": source.name}
    found |= {"prompts": list(PROMPTS), "steps": _STEPS, "at_steps": list(_AT), "guidance_scale": _CFG, "seed": _SEED}
    found |= {"sigmas": list(SIGMAS), "boundaries": {}}
    for boundary in BOUNDARIES:
        tell(f"boundary {boundary}")
        with record_energy(pipe, None, SIGMAS, _AT, boundary=boundary, dtype=torch.float64) as recorder:
            generator = torch.Generator("cpu").manual_seed(_SEED)
            pipe(list(PROMPTS), num_inference_steps=_STEPS, guidance_scale=_CFG, generator=generator)
        cells = [(r.by_query, r.by_key) for r in recorder.records if r.by_key is not None]
        found["boundaries"][boundary] = count(cells)
    found["layers"] = [layer.name for layer in recorder.layers]

    tell("one run")
    job = Job("a large red ring above a small blue square", "", 64, 64, _SEED, _STEPS, _CFG)
    with record_energy(pipe, None, SIGMAS, (0, _STEPS // 2, _STEPS - 1)) as recorder:
        picture = draw(pipe, job, None).image
    details = describe(source, job, None, torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder / "energy.json", report.summary(recorder, details, "reflect"))
    save(picture, folder / "picture.png", details)
    text = json.dumps(report.in_words(found), indent=1, ensure_ascii=False)
    (folder / "statements.json").write_text(text + "\n", encoding="utf-8")
    return found


def count(cells: _Cells) -> dict[str, Any]:
    """Of every head of every sample in every record: in how many a statement holds, by sigma, and medians of changes.

    The first sigma of a record is 0; there is a number for each of the others.
    """
    by_query, by_key = (_joined([cell[cut] for cell in cells], "energy") for cut in (0, 1))
    # [sigmas, cells, queries or keys]
    queries, keys = (torch.cat([cell[cut].energies.flatten(1, 2) for cell in cells], dim=1) for cut in (0, 1))
    mean, variance, within = (_joined([cell[0] for cell in cells], n) for n in ("mean", "variance", "query_variance"))
    tokens = queries.shape[2]
    found: dict[str, Any] = {
        "cells": queries.shape[1],
        "energy_by_query_rises": _share(_above(by_query[1:], by_query[:1])),
        "energy_by_key_rises": _share(_above(by_key[1:], by_key[:1])),
        "rises_over_the_sigma_before": _share(_above(by_query[1:], by_query[:-1])),
        "a_querys_own_rises": _share(_above(queries[1:], queries[:1]).flatten(1)),
        "a_keys_own_rises": _share(_above(keys[1:], keys[:1]).flatten(1)),
        "energy_rise": _median((by_query[1:] - by_query[:1]) / tokens),
        "mean_drift": _largest((mean[1:] - mean[:1]).abs() / variance[:1].sqrt()),
        "variance_left": _median(within[1:] / within[:1]),
    }
    for factor in ("none", "paper", "chain"):
        values = torch.cat([cell[1].log_curvature[factor].flatten(1) for cell in cells], dim=1)
        change = (values[1:] - values[:1]) / tokens**2
        found[f"determinant_{factor}"] = {"falls": _share(change < 0), "change": _median(change)}
    return found


def _joined(found: list[OverSigma], name: str) -> torch.Tensor:
    """``[sigmas, cells]`` of a quantity that every head has one of."""
    return torch.cat([getattr(one, name).flatten(1) for one in found], dim=1)


def _above(later: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    return later >= earlier - _ROUNDING * earlier.abs()


def _share(holds: torch.Tensor) -> list[float]:
    return [float(value) for value in holds.double().mean(dim=1)]


def _median(values: torch.Tensor) -> list[float]:
    return [float(value) for value in values.median(dim=1).values]


def _largest(values: torch.Tensor) -> list[float]:
    return [float(value) for value in values.amax(dim=1)]


def committed() -> dict[str, Any]:
    """The committed counts."""
    found = report.in_numbers(json.loads((FOLDER / "statements.json").read_text(encoding="utf-8")))
    assert isinstance(found, dict)
    return found


def committed_run() -> dict[str, Any]:
    """The committed run."""
    return read(FOLDER / "energy.json")
