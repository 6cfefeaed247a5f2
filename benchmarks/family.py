# SPDX-License-Identifier: Apache-2.0
"""What each guidance of the family, and several together, do to samples of the bundled model.

Settings are not chosen by what they measured: scales as the papers recommend and around, in the mid block. Samples
begin from the same noise whatever the setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS
from segkern.core.environment import environment
from segkern.generation.loading import find_model, load_pipeline
from studies.evaluation import report
from studies.evaluation.judge import load_judge
from studies.evaluation.study import MODES, Setting, Study, family

RESULT = RESULTS / "family" / "demo.json"
SEEDS = (1, 2, 3)
IMAGES = 128
STEPS = 10


def settings(modes: tuple[str, ...] = MODES) -> list[Setting]:
    """All of them."""
    return [setting for mode in modes for setting in family(mode)]


def measure(
    folder: Path,
    advance: Callable[[str, int], None],
    images: int = IMAGES,
    seeds: tuple[int, ...] = SEEDS,
    steps: int = STEPS,
    out: Path = RESULT,
) -> dict[str, Any]:
    """Measure and write ``benchmarks/results/family/demo.json``; what was cut off in ``folder`` goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    pipe = load_pipeline(find_model("demo", None), torch.bfloat16, device)
    study = Study(pipe, load_judge(), folder / "cells.jsonl", images, steps)

    def one(setting: Setting, seed: int) -> dict[str, Any]:
        name = f"{setting.mode}, {report.describe(setting)}, seed {seed}"
        return study.measure(setting, seed, lambda count: advance(name, count))

    chosen = settings()
    cells = [one(setting, seed) for seed in seeds for setting in chosen]
    cells.sort(key=lambda cell: chosen.index(report.setting_of(cell)))
    found = {"environment": environment(device, "diffusers", "torchmetrics"), **study.kind}
    found |= {"images_per_seed": images, "seeds": list(seeds), "steps": steps, "rows": report.summarise(cells)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def committed() -> dict[str, Any] | None:
    """The committed file."""
    if not RESULT.exists():
        return None
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def section(found: dict[str, Any] | None) -> str:
    """For the page about the evaluation."""
    if found is None:
        return "## The family\n\nNot measured.\n"
    env = found["environment"]
    parts = [
        "## The family",
        f"PAG, SAG, SEG, CFG and some of them together (`python -m benchmarks family`), every guidance in the mid "
        f"block, SAG by its first layer; scales are the papers' and around, none is chosen by what it measured. "
        f"{found['images_per_seed']} images for each of the seeds {', '.join(map(str, found['seeds']))}, "
        f"{found['steps']} steps; {env['device']}, {found['dtype']}, torch {env['torch']}, diffusers "
        f"{env['diffusers']}, commit `{env['commit']}`, weights `{found['weights']}`. Another machine or version "
        f"rounds otherwise than the tables above: compare within this one.",
    ]
    for mode in report.modes(found["rows"]):
        rows = [row for row in found["rows"] if row["setting"]["mode"] == mode]
        parts += [f"### {mode.capitalize()}", report.table(rows)]
    return "\n\n".join(parts) + "\n"
