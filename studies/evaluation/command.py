# SPDX-License-Identifier: Apache-2.0
"""``python -m studies.evaluation``: from a user's words to a study, with progress, to JSON, a table and a plot."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from segkern.core.environment import environment
from segkern.generation.loading import Source, describe_unet_pipeline, load_pipeline
from segkern.generation.options import listed
from studies.evaluation import report
from studies.evaluation.judge import load_judge
from studies.evaluation.plots import plot
from studies.evaluation.run import Design, carry_out
from studies.evaluation.study import MODES, Study, check_images


def design(
    modes: str, scales: str, sigmas: str, cfg_scales: str, layers: str, seeds: str, selection_seeds: str
) -> Design:
    """The design that the options describe.

    Raises:
        ValueError: for an option that says nothing sensible; the message quotes it.
    """
    from segkern.integrations.diffusers import SEG

    found = Design(
        listed("--modes", modes, str, " and ".join(MODES)),
        listed("--scales", scales, float, "numbers"),
        listed("--sigmas", sigmas, float, "numbers such as 4 or inf"),
        listed("--cfg-scales", cfg_scales, float, "numbers", empty=True),
        ",".join(listed("--layers", layers, str, "layers")),
        listed("--seeds", seeds, int, "whole numbers"),
        listed("--selection-seeds", selection_seeds, int, "whole numbers", empty=True),
    )
    for mode in found.modes:
        if mode not in MODES:
            raise ValueError(f"--modes takes {' and '.join(MODES)}, got {mode!r}")
    for scale in found.scales:
        for sigma in found.sigmas:
            SEG(scale, sigma, found.layers.split(","))
    for name, values in (("scales", found.scales), ("sigmas", found.sigmas)):
        if min(values) <= 0:
            raise ValueError(f"--{name} must be above 0, no guidance is measured anyway; got {min(values):g}")
    for cfg in found.cfg_scales:
        if not 1 < cfg < math.inf:
            raise ValueError(f"--cfg-scales must be finite and above 1, which is none; got {cfg:g}")
    for seed in (*found.seeds, *found.selection_seeds):
        if not 0 <= seed < 2**32:
            raise ValueError(f"a seed lies between 0 and {2**32 - 1}, got {seed}")
    return found


def prepare(
    source: Source,
    wanted: Design,
    dtype: torch.dtype,
    device: torch.device,
    out: Path,
    images: int,
    steps: int,
    batch: int,
) -> Study:
    """Load the model and the judge, and what an earlier run measured.

    Raises:
        ValueError: for layers that the model lacks, and when ``out`` holds measurements of another model.
        OSError: when files are missing.
    """
    from segkern.integrations.diffusers.models.layers import list_layers, select_layers

    select_layers(list_layers(describe_unet_pipeline(source)), wanted.layers.split(","))
    check_images(images)
    out.mkdir(parents=True, exist_ok=True)
    judge = load_judge().to(device)
    return Study(load_pipeline(source, dtype, device), judge, out / "cells.jsonl", images, steps, batch)


def run(study: Study, wanted: Design, source: Source, out: Path) -> None:
    """Measure, and write ``evaluation.json``, ``evaluation.md`` and ``evaluation.png`` to ``out``."""
    console = Console(stderr=True)
    measured_with = environment(study.pipe.device, "diffusers", "transformers", "torchmetrics")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("images", total=wanted.runs * study.images)

        def advance(name: str, count: int) -> None:
            progress.update(task, advance=count, description=name)

        found = carry_out(study, wanted, advance)
        progress.update(task, completed=wanted.runs * study.images, description="done")
    found = {
        "model": source.name,
        **study.kind,
        **measured_with,
        **found,
    }
    report.write(out / "evaluation.json", found)
    text = report.markdown(found)
    (out / "evaluation.md").write_text(text, encoding="utf-8")
    plot(found["rows"], out / "evaluation.png", report.title(found), found["drawings"])
    typer.echo(text)
    for name in ("evaluation.json", "evaluation.md", "evaluation.png"):
        typer.echo(f"wrote {out / name}")
