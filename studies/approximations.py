# SPDX-License-Identifier: Apache-2.0
"""Measure approximations of SEG on the bundled model: ``python -m studies.approximations``.

Measures the setting that the evaluation chose, with a perturbed branch that several steps share (``SEG(reuse=...)``)
and with guidance in a range of steps. All settings start from the same noise. The result is
``benchmarks/results/approximations/demo.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from segkern.core.environment import environment
from segkern.generation.loading import DEMO, find_model, load_pipeline
from studies.evaluation import report
from studies.evaluation.judge import load_judge
from studies.evaluation.settings import Setting
from studies.evaluation.study import Study

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "approximations" / "demo.json"
SEEDS = (1, 2, 3)
IMAGES = 128
STEPS = 10


def approximations() -> list[Setting]:
    """Return no guidance, the chosen setting, and approximations of it."""
    chosen = Setting.from_dict(report.read(DEMO / "evaluation.json")["chosen"])
    reused = [replace(chosen, reuse=reuse) for reuse in (2, 3, 5)]
    parts = [replace(chosen, start=start, stop=stop) for start, stop in ((0.0, 0.5), (0.5, 1.0), (0.2, 0.8))]
    return [Setting(chosen.mode), chosen, *reused, *parts]


def measure(
    settings: list[Setting],
    folder: Path,
    advance: Callable[[str, int], None],
    images: int = IMAGES,
    seeds: tuple[int, ...] = SEEDS,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Measure all settings. An interrupted study resumes from the measurements in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    pipe = load_pipeline(find_model("demo"), torch.bfloat16, device)
    study = Study(pipe, load_judge(), folder / "cells.jsonl", images, steps)
    cells = [study.measure(setting, seed, advance) for setting in settings for seed in seeds]
    result: dict[str, Any] = {"environment": environment(device, "diffusers", "torchmetrics"), **study.kind}
    result |= {"images_per_seed": images, "seeds": list(seeds), "steps": steps, "rows": report.summarise(cells)}
    return result


def main(
    folder: Annotated[Path, typer.Option(help="Folder for intermediate measurements.")] = Path(
        "outputs/approximations"
    ),
) -> None:
    """Measure approximations of SEG on the bundled model. An interrupted run resumes."""
    settings = approximations()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=len(settings) * len(SEEDS) * IMAGES)
        result = measure(settings, folder, lambda what, n: progress.update(task, advance=n, description=what))
    report.write(RESULT, result)
    typer.echo(f"wrote {RESULT}")


if __name__ == "__main__":
    typer.run(main)
