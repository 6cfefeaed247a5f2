# SPDX-License-Identifier: Apache-2.0
"""Evaluate the bundled model: ``python -m studies.evaluation``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from segkern.cli.terminal import refusing
from segkern.core.environment import environment
from segkern.generation import loading
from studies.evaluation import report
from studies.evaluation.design import Design, carry_out
from studies.evaluation.judge import load_judge
from studies.evaluation.plots import plot
from studies.evaluation.study import Study

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="'demo' or the folder of a checkpoint that was trained on the drawings.")
    ] = "demo",
    images: Annotated[int, typer.Option(min=8, help="Number of images per setting and seed.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Number of inference steps.")] = 10,
    dtype: Annotated[
        str, typer.Option(help="auto, fp32, fp16 or bf16; auto selects fp16 on CUDA and fp32 elsewhere.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, or a CUDA device such as cuda or cuda:1.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for JSON, plot and intermediate measurements.")] = Path(
        "outputs/evaluation"
    ),
) -> None:
    """Measure the effect of guidance on samples: fidelity, diversity, captions. An interrupted run resumes."""
    loading.quiet_libraries()
    design = Design()
    with refusing():
        target = loading.find_device(device)
        pipe = loading.load_pipeline(loading.find_model(model), loading.find_dtype(dtype, target), target)
        out.mkdir(parents=True, exist_ok=True)
        study = Study(pipe, load_judge().to(target), out / "cells.jsonl", images, steps)

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("images", total=design.runs * images)
        results = carry_out(study, design, lambda name, count: progress.update(task, advance=count, description=name))
    about = environment(target, "diffusers", "transformers", "torchmetrics")
    evaluation = {"model": model, **study.kind, **about, **results}
    report.write(out / "evaluation.json", evaluation)
    plot(evaluation, out / "evaluation.png")
    typer.echo(report.text(evaluation))
    typer.echo(f"wrote evaluation.json and evaluation.png to {out}")


if __name__ == "__main__":
    app(prog_name="python -m studies.evaluation")
