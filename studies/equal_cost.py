# SPDX-License-Identifier: Apache-2.0
"""Compare guidance methods on the bundled model at equal cost: ``python -m studies.equal_cost``.

Every run needs about as many floating-point operations in the denoiser as ``STEPS`` steps without guidance, so runs
with guidance have fewer steps. Every method, alone and together with classifier-free guidance (CFG), has four candidate
settings. The candidate with the lowest Fréchet distance on the selection seeds is measured on other seeds. The result
is ``benchmarks/results/equal-cost/demo.json``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.flop_counter import FlopCounterMode

import segkern.ops.flops  # noqa: F401  (registers the FLOP formulas of segkern's operators)
from segkern.core.environment import environment
from segkern.generation.loading import find_model, load_pipeline
from segkern.integrations.diffusers import guide
from studies.evaluation import report
from studies.evaluation.judge import load_judge
from studies.evaluation.settings import MODES, Setting
from studies.evaluation.study import Study

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "equal-cost" / "demo.json"
STEPS = 20
IMAGES = 128
SEEDS = (1, 2, 3)
SELECTION_SEEDS = (101,)
MEASURES = ("frechet_distance", "caption_accuracy")  # whose differences to a baseline are reported

# Four candidates of every method, as fields of ``Setting``: scales around the published ones. SLG also differs in its
# range of steps, of which the first is the published one, and TPG in its layers, of which the official ones are "down".
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "SEG": [{"seg": scale, "sigma": math.inf, "layers": "mid"} for scale in (1.0, 2.0, 3.0, 5.0)],
    "PAG": [{"pag": scale} for scale in (0.5, 1.0, 2.0, 3.0)],
    "SEG + PAG": [{"seg": scale, "sigma": math.inf, "layers": "mid", "pag": scale} for scale in (0.5, 1.0, 1.5, 2.0)],
    "SAG": [{"sag": scale} for scale in (0.25, 0.5, 0.75, 1.5)],
    "SLG": [
        {"slg": scale, "layers": "mid", "start": start, "stop": stop}
        for start, stop in ((0.01, 0.2), (0.0, 1.0))
        for scale in (1.0, 2.8)
    ],
    "TPG": [{"tpg": scale, "layers": layers} for layers in ("down", "mid") for scale in (1.0, 3.0)],
}
CFG_SCALES = (1.5, 2.0, 3.0, 5.0)
CFG_SCALES_WITH_GUIDANCE = (2.0, 3.0)


def candidates() -> list[list[Setting]]:
    """Return four candidate settings for every method: without a prompt, with prompts, and together with CFG."""
    groups = [[Setting(mode, **fields) for fields in method] for mode in MODES for method in CANDIDATES.values()]
    groups.append([Setting("prompts", cfg) for cfg in CFG_SCALES])
    for method in CANDIDATES.values():
        groups.append([Setting("prompts", cfg, **fields) for cfg in CFG_SCALES_WITH_GUIDANCE for fields in method[::2]])
    return groups


def operations(pipe: Any, setting: Setting, steps: int) -> int:
    """Return the floating-point operations in the denoiser for one image."""
    specs = setting.specs()
    guidance = guide(pipe, *specs) if specs else None
    try:
        with FlopCounterMode(display=False) as counter:
            generator = torch.Generator().manual_seed(0)
            pipe(
                "fox",
                guidance_scale=setting.cfg,
                num_inference_steps=steps,
                generator=generator,
                output_type="latent",
            )
    finally:
        if guidance:
            guidance.remove()
    return sum(counter.get_flop_counts()[type(pipe.unet).__name__].values())


def affordable(pipe: Any, setting: Setting, steps: int = STEPS) -> tuple[int, float]:
    """Return the number of steps whose cost is closest to that of unguided steps, and the ratio of the two costs.

    Args:
        pipe: Pipeline of the bundled model.
        setting: Setting to sample with.
        steps: Number of unguided steps.
    """
    budget = operations(pipe, Setting(setting.mode), steps)
    estimate = round(steps * budget / operations(pipe, setting, steps))
    near = range(max(1, estimate - 1), estimate + 2)  # the share of guided steps depends on the number of steps
    costs = {count: operations(pipe, setting, count) / budget for count in near}
    count = min(costs, key=lambda number: abs(costs[number] - 1))
    return count, costs[count]


def measure(
    study: Study,
    advance: Callable[[str, int], None],
    groups: Sequence[Sequence[Setting]],
    seeds: Sequence[int] = SEEDS,
    selection_seeds: Sequence[int] = SELECTION_SEEDS,
) -> dict[str, Any]:
    """Choose a setting in every group, measure the chosen settings and no guidance on other seeds, and compare them.

    Args:
        study: Study that measures. Its number of steps is that of runs without guidance.
        advance: Called with the name of the measurement and the size of every batch of images.
        groups: Candidate settings, a list for every method.
        seeds: Seeds whose measurements are reported.
        selection_seeds: Seeds on which a setting of every group is chosen.
    """
    costs: dict[Setting, tuple[int, float]] = {}

    def cells(setting: Setting, at: Sequence[int]) -> list[dict[str, Any]]:
        if setting not in costs:
            costs[setting] = affordable(study.pipe, setting, study.steps)
        return [study.measure(setting, seed, advance, costs[setting][0]) for seed in at]

    selection = [[report.summarise(cells(setting, selection_seeds))[0] for setting in group] for group in groups]
    chosen = [min(rows, key=lambda row: row["measures"]["frechet_distance"]["mean"]) for rows in selection]
    settings = [Setting(mode) for mode in report.modes([row for rows in selection for row in rows])]
    settings += [report.setting_of(row) for row in chosen]
    measured = {setting: cells(setting, seeds) for setting in settings}
    guided_by_text = next((setting for setting in settings if setting.method == "CFG"), None)
    rows = []
    for setting, of_setting in measured.items():
        steps, cost = costs[setting]
        row = report.summarise(of_setting)[0] | {"method": setting.method, "steps": steps, "cost": cost}
        row["to_unguided"] = difference(of_setting, measured[Setting(setting.mode)])
        if guided_by_text and setting.cfg > 1 and setting != guided_by_text:
            row["to_cfg"] = difference(of_setting, measured[guided_by_text])
        rows.append(row)
    for row in (row for group in selection for row in group):
        row["steps"], row["cost"] = costs[report.setting_of(row)]
    return {"rows": rows, "selection": selection}


def difference(cells: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation over seeds of the differences of measures to a baseline with equal seeds."""
    differences = {}
    for name in MEASURES:
        if name in cells[0]["measures"]:
            pairs = zip(cells, baseline, strict=True)
            values = [cell["measures"][name] - base["measures"][name] for cell, base in pairs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            differences[name] = {"mean": statistics.fmean(values), "spread": spread}
    return differences


def main(
    folder: Annotated[Path, typer.Option(help="Folder for intermediate measurements.")] = Path("outputs/equal-cost"),
) -> None:
    """Compare guidance methods on the bundled model at equal cost. An interrupted run resumes."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    pipe = load_pipeline(find_model("demo"), torch.bfloat16, device)
    study = Study(pipe, load_judge(), folder / "cells.jsonl", IMAGES, STEPS)
    groups = candidates()
    runs = sum(map(len, groups)) * len(SELECTION_SEEDS) + (len(groups) + len(MODES)) * len(SEEDS)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=runs * IMAGES)
        comparison = measure(study, lambda what, n: progress.update(task, advance=n, description=what), groups)
    result = {"environment": environment(device, "diffusers", "torchmetrics"), **study.kind, "unguided_steps": STEPS}
    result |= {"images_per_seed": IMAGES, "seeds": list(SEEDS), "selection_seeds": list(SELECTION_SEEDS)}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    report.write(RESULT, result | comparison)
    typer.echo(f"wrote {RESULT}")


if __name__ == "__main__":
    typer.run(main)
