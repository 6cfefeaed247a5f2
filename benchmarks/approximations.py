# SPDX-License-Identifier: Apache-2.0
"""What approximations of a guided run cost in quality, on the bundled model, without prompts.

The exact run is the setting that the committed evaluation chose (``studies.evaluation``, on other seeds). Beside it: a
perturbed branch that serves several steps (``SEG(reuse=...)``), and guidance in part of the run (``start``, ``stop``).
Samples begin from the same noise whatever the setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS
from benchmarks.tables import markdown
from segkern.core.environment import environment
from segkern.generation.loading import DEMO, find_model, load_pipeline
from studies.evaluation import report
from studies.evaluation.judge import load_judge
from studies.evaluation.study import Setting, Study

RESULT = RESULTS / "approximations" / "demo.json"
SEEDS = (1, 2, 3)
IMAGES = 128
STEPS = 10
_MEASURES = {
    "frechet_distance": "Frechet distance",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
}


def settings() -> list[Setting]:
    """No guidance, the exact run, then the approximations of it."""
    chosen = Setting.from_dict(report.read(DEMO / "evaluation.json")["chosen"])
    found = [Setting(chosen.mode), chosen]
    found += [replace(chosen, reuse=reuse) for reuse in (2, 3, 5)]
    return found + [replace(chosen, start=start, stop=stop) for start, stop in ((0.0, 0.5), (0.5, 1.0), (0.2, 0.8))]


def computed(setting: Setting, steps: int) -> int:
    """Steps of a run in which the perturbed branch is computed.

    Example:
        >>> computed(Setting("unconditional", seg=4.0, sigma=2.0, layers="mid", start=0.5, reuse=2), steps=10)
        3
    """
    if not setting.seg:
        return 0
    acting = sum(setting.start <= step / steps < setting.stop for step in range(steps))
    return -(-acting // setting.reuse)


def measure(
    folder: Path,
    advance: Callable[[str, int], None],
    dtype: torch.dtype = torch.bfloat16,
    images: int = IMAGES,
    seeds: tuple[int, ...] = SEEDS,
    steps: int = STEPS,
    out: Path = RESULT,
) -> dict[str, Any]:
    """Measure and write ``benchmarks/results/approximations/demo.json``; what was cut off in ``folder`` goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    pipe = load_pipeline(find_model("demo", None), dtype, device)
    study = Study(pipe, load_judge(), folder / "cells.jsonl", images, steps)

    def one(setting: Setting, seed: int) -> dict[str, Any]:
        name = f"{report.describe(setting)}, seed {seed}"
        return study.measure(setting, seed, lambda count: advance(name, count))

    cells = [one(setting, seed) for setting in settings() for seed in seeds]
    rows = report.summarise(cells)
    for row in rows:
        row["computed"] = computed(report.setting_of(row), steps)
    found = {"environment": environment(device, "diffusers", "torchmetrics"), **study.kind}
    found |= {"images_per_seed": images, "seeds": list(seeds), "steps": steps, "rows": rows}
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def committed() -> dict[str, Any] | None:
    """The committed file."""
    if not RESULT.exists():
        return None
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def table(found: dict[str, Any]) -> str:
    """Settings, steps whose branch is computed, and measures with their spread over seeds, in markdown."""
    shown = []
    for row in found["rows"]:
        measures = (row["measures"][name] for name in _MEASURES)
        numbers = [f"{one['mean']:.3g} ± {one['spread']:.2g}" for one in measures]
        shown.append([report.describe(report.setting_of(row)), f"{row['computed']} of {found['steps']}", *numbers])
    return markdown(("run", "branch computed", *_MEASURES.values()), shown)
