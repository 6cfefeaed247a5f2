# SPDX-License-Identifier: Apache-2.0
"""Two smaller studies of the bundled model: ``python -m studies.comparisons NAME``.

``approximations`` measures the setting that the evaluation chose, with a perturbed branch that several steps share
(``SEG(reuse=...)``) and with guidance in a range of steps. ``family`` measures PAG, SAG, SEG, CFG and combinations of
them, at and around the scales of the papers. All settings start from the same noise. Results go to
``benchmarks/results/NAME/demo.json``.
"""

from __future__ import annotations

import math
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
from studies.evaluation.settings import MODES, Setting
from studies.evaluation.study import Study

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SEEDS = (1, 2, 3)
IMAGES = 128
STEPS = 10


def approximations() -> list[Setting]:
    """Return no guidance, the chosen setting, and approximations of it."""
    chosen = Setting.from_dict(report.read(DEMO / "evaluation.json")["chosen"])
    reused = [replace(chosen, reuse=reuse) for reuse in (2, 3, 5)]
    parts = [replace(chosen, start=start, stop=stop) for start, stop in ((0.0, 0.5), (0.5, 1.0), (0.2, 0.8))]
    return [Setting(chosen.mode), chosen, *reused, *parts]


def family() -> list[Setting]:
    """Return every guidance method at several scales, and combinations, without and with prompts."""
    settings = []
    for mode in MODES:
        plain = Setting(mode)
        blurred = replace(plain, sigma=math.inf, layers="mid")
        settings += [
            plain,
            *(replace(blurred, seg=scale) for scale in (2.0, 3.0)),
            *(replace(plain, pag=scale) for scale in (1.0, 2.0, 3.0)),
            *(replace(plain, sag=scale) for scale in (0.5, 0.75, 1.5)),
            replace(blurred, seg=1.5, pag=1.5),
        ]
    cfg = Setting("prompts", cfg=2.0)
    blurred = replace(cfg, sigma=math.inf, layers="mid")
    settings += [cfg, replace(blurred, seg=1.0), replace(cfg, pag=1.0), replace(cfg, sag=0.75)]
    return [*settings, replace(blurred, seg=0.5, pag=0.5)]


STUDIES: dict[str, Callable[[], list[Setting]]] = {"approximations": approximations, "family": family}


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
    name: Annotated[str, typer.Argument(help=f"{' or '.join(STUDIES)}.")],
    folder: Annotated[Path, typer.Option(help="Folder for intermediate measurements.")] = Path("outputs/comparisons"),
) -> None:
    """Measure one study of the bundled model. Takes a while on a CPU."""
    if name not in STUDIES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(STUDIES)}")
    settings = STUDIES[name]()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=len(settings) * len(SEEDS) * IMAGES)
        result = measure(settings, folder / name, lambda what, n: progress.update(task, advance=n, description=what))
    path = RESULTS / name / "demo.json"
    report.write(path, result)
    typer.echo(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
